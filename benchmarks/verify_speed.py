"""`kconvert verify` of checkpoints and what was made of them against reading the same bytes with `dd`; memory, and reports.

What Python, torch and compressed-tensors take to start, which is the time of verifying a tiny checkpoint, counts neither in the
comparison with `dd` nor in the time of the cores, which is given for each element of the weights, in ns of one core. Memory
is what all processes have together at most (PSS: of pages that several share, each has its part), in a run of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from common import (
    GB,
    KCONVERT,
    Child,
    alternate,
    arguments,
    machine,
    make_cold,
    nbytes,
    peak_together,
    remove,
    run,
    sample,
    spread,
    table,
    tensor_files,
    verdict,
)

TARGET_MB = 450
TINY = ["--experts=2", "--hidden=256", "--moe-intermediate=128", "--heads=2", "--q-rank=32", "--kv-rank=32"]
SOURCE = ["--layers=1", "--dense-layers=0", "--vocab=1024"]
# What is made of which, and how; `int4` in the table is the sample.
PAIRS = {
    "bf16": ("sample", ["int4-to-bf16"]),
    "fp8": ("sample", ["int4-to-fp8"]),
    "amxint8": ("sample", ["repack-amx", "--method=AMXINT8", "--numa=2"]),
    "amxint4": ("sample", ["repack-amx", "--method=AMXINT4", "--numa=2"]),
    "int4": ("bf16", ["bf16-to-int4"]),
    "bf16-again": ("fp8", ["fp8-to-bf16"]),
    "fp8-mse": ("sample", ["int4-to-fp8", "--scales=mse"]),
    "nvfp4": ("sample", ["convert", "--to=nvfp4"]),
    "nvfp4-mse": ("sample", ["convert", "--to=nvfp4", "--scales=mse"]),
    "mxfp4": ("sample", ["convert", "--to=mxfp4"]),
    "mxfp4-mse": ("sample", ["convert", "--to=mxfp4", "--scales=mse"]),
    "mxfp8": ("sample", ["convert", "--to=mxfp8"]),
    "nvfp4-kept": ("mxfp4", ["convert", "--to=nvfp4"]),
    "gguf": ("sample", ["convert", "--to=gguf"]),
    "mlx": ("sample", ["convert", "--to=mlx"]),
}


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=16, help="of the layer that is compared [16]")
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=list(PAIRS), help="only these outputs")
    options = parser.parse_args()
    made = {"sample": sample(options.dir, f"verify-{options.experts}-experts", *SOURCE, f"--experts={options.experts}")}
    report = options.dir / "verify-report.html"
    for name in options.pairs:
        compare(name, make(PAIRS[name][0], made), make(name, made), report, options.runs)
    machine(options.dir)
    for path in (*list(made.values())[1:], report):
        remove(path)


def make(name: str, made: dict[str, Path]) -> Path:
    """The checkpoint of this name, among those that are `made` or from now on."""
    if name not in made:
        source_name, (command, *terms) = PAIRS[name]
        source, output = make(source_name, made), made["sample"].with_name(f"{made['sample'].name}-{name}")
        run([KCONVERT, command, source, output, "-q", "--overwrite", *terms])
        made[name] = output
    return made[name]


def compare(name: str, source: Path, output: Path, report: Path, runs: int) -> None:
    """One pair: verified, verified with a report, read, and a tiny checkpoint verified with itself."""
    tiny = sample(report.parent, "verify-tiny", *SOURCE, *TINY)
    sides: dict[str, Callable[[], Child]] = {
        f"verify {name}": lambda: verify(source, output),
        f"verify {name} --report": lambda: verify(source, output, "--report", report),
        "dd of both": lambda: read(source, output),
        "start": lambda: verify(tiny, tiny),
    }
    results = alternate(runs, sides)
    size = nbytes(tensor_files(output)) + nbytes(tensor_files(source))
    elements = json.loads(verify(source, output, "--json").stdout)["totals"]["elements"]
    begun = results.pop("start")
    start, start_cpu = median(child.seconds for child in begun), median(child.cpu for child in begun)
    rows = []
    for side, children in results.items():
        verifies, terms = side.startswith("verify"), ["--report", report] if side.endswith("--report") else []
        seconds = [child.seconds - start * verifies for child in children]
        ratios = [mine / theirs.seconds for mine, theirs in zip(seconds, results["dd of both"], strict=True)]
        rows.append(
            [
                side,
                f"{size / GB:.1f} GB",
                spread([child.seconds for child in children], 1, "s"),
                spread([size / value / GB for value in seconds], 2, "GB/s"),
                spread(ratios) if verifies else "",
                spread([(child.cpu - start_cpu) / elements * 1e9 for child in children], 1, "ns") if verifies else "",
                memory(source, output, *terms) if verifies else "",
            ]
        )
    table(
        ["what", "read", "wall time", "speed after starting", "of dd's time", "CPU an element", "all processes"], rows
    )
    print(f"starting: {start:.1f} s")


def verify(source: Path, output: Path, *options: str | Path) -> Child:
    make_cold(source, output)
    return run([KCONVERT, "verify", source, output, "-q", *options])


def memory(source: Path, output: Path, *options: str | Path) -> str:
    peak = peak_together([KCONVERT, "verify", source, output, "-q", *options]) / 1e6
    return f"{peak:.0f} MB {verdict(peak, TARGET_MB, 'MB')}"


def read(*checkpoints: Path) -> Child:
    make_cold(*checkpoints)
    files = " ".join(str(file) for checkpoint in checkpoints for file in tensor_files(checkpoint))
    return run(["sh", "-c", f"for file in {files}; do dd if=$file of=/dev/null bs=4M iflag=direct status=none; done"])


if __name__ == "__main__":
    main()
