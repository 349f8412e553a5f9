"""What a command takes before it does anything: `--help`, `inspect`, verifying a tiny checkpoint, converting a small one; and
`launch` of a whole Kimi-K2-Thinking (62 shards of holes, see planning.py), as it is and where a conversion has to be named.

Of `verify` the time until it reads the first tensor is given as well, and apart what loading one kernel takes, numpy's import
included, and numba's import, which only a machine's first run has need of.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import Popen

from common import KCONVERT, Child, alternate, arguments, figures, machine, remove, run, sample, table, verdict
from planning import holes

TINY = ["--layers=1", "--dense-layers=0", "--vocab=1024", "--experts=2", "--heads=2", "--q-rank=32", "--kv-rank=32"]
TINY += ["--hidden=256", "--moe-intermediate=128"]
SMALL = ["--layers=1", "--dense-layers=0", "--vocab=1024", "--experts=3", "--heads=4", "--q-rank=64", "--kv-rank=64"]
SMALL += ["--intermediate=512"]
LAUNCHED = "kimi-k2-thinking"
LAUNCHES = {f"launch --engine {engine}": engine for engine in ("vllm", "ktransformers", "llama.cpp", "mlx")}
TARGETS = {"--help": 0.15, "inspect": 2.0, "int4-to-bf16": 0.8, **dict.fromkeys(LAUNCHES, 0.5)}  # seconds
FIRST_BYTE = 1.2
KERNEL = (
    "import numpy; from kconvert.formats.kernels import Kernels\n"
    "Kernels('dense').decode_bf16(numpy.zeros(64, 'u2'), numpy.zeros(64, 'f4'))"
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint for `inspect`, such as planning.py makes [a tiny one]")
    options = parser.parse_args()
    tiny = sample(options.dir, "start-tiny", *TINY)
    small = sample(options.dir, "start-small", *SMALL)
    made, written = options.dir / "start-tiny-bf16", options.dir / "start-small-bf16"
    run([KCONVERT, "int4-to-bf16", tiny, made, "-q", "--overwrite"])
    whole = holes(options.dir / f"planning-{LAUNCHED}", LAUNCHED)
    sides: dict[str, Callable[[], Child]] = {
        "--help": lambda: run([KCONVERT, "--help"]),
        "inspect": lambda: run([KCONVERT, "inspect", options.model or tiny]),
        "verify": lambda: run([KCONVERT, "verify", tiny, made, "-q"]),
        "int4-to-bf16": lambda: convert(small, written),
        **{side: partial(launch, whole, engine) for side, engine in LAUNCHES.items()},
        "a kernel": lambda: run([sys.executable, "-c", KERNEL]),
        "numba": lambda: run([sys.executable, "-c", "import numba"]),
        "numpy": lambda: run([sys.executable, "-c", "import numpy"]),
    }
    for side in sides.values():
        side()  # so that files and compiled kernels are there
    results = alternate(options.runs, sides)
    table(["what", "wall time", "CPU", "peak RSS"], [[side, *figures(found, 2)] for side, found in results.items()])
    for side, target in TARGETS.items():
        print(f"{side}: {verdict(median(child.seconds for child in results[side]), target, 's')}")
    begins = median(first_byte(options, tiny, made) for _ in range(options.runs))
    print(f"verify, until it reads tensors: {begins:.2f} s  {verdict(begins, FIRST_BYTE, 's')}")
    machine(options.dir)
    for path in (made, written):
        remove(path)


def launch(model: Path, engine: str) -> Child:
    """Exit code 2 is the sentence that names what makes what the engine runs."""
    return run([KCONVERT, "launch", model, "--engine", engine], allowed=(0, 2))


def convert(source: Path, output: Path) -> Child:
    remove(output)
    return run([KCONVERT, "int4-to-bf16", source, output, "-q"])


def first_byte(options: argparse.Namespace, source: Path, output: Path) -> float:
    """Seconds until `verify` begins with the first pair, at which it makes a file; it is waited for."""
    script = (
        "import sys\n"
        "from kconvert.proof.parity import comparing\n"
        "sound = comparing.Job.compare\n"
        "def compare(self, number, quickly=True):\n"
        "    open(sys.argv.pop(), 'x').close() if number == 0 else None\n"
        "    return sound(self, number, quickly)\n"
        "comparing.Job.compare = compare\n"
        "from kconvert import verify\n"
        "verify(*sys.argv[1:3], thorough=False)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        begun, started = Path(folder, "begun"), time.perf_counter()
        child = Popen([sys.executable, "-c", script, source, output, begun])
        while not begun.exists() and child.poll() is None:
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        child.wait()
    return seconds


if __name__ == "__main__":
    main()
