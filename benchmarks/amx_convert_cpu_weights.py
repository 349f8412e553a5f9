"""Experts of [2048, 7168] to AMXINT4 against kt-kernel's own `convert_cpu_weights.py`, and peak memory.

kt-kernel's side needs a CPU with AVX-512, an environment with kt-kernel, triton and gguf, and the script from its repository:

    python benchmarks/amx_convert_cpu_weights.py --converter kt-kernel/scripts/convert_cpu_weights.py --peer-python PYTHON

Without --converter only kconvert is measured. kt-kernel reads no INT4, so it goes from BF16 in both comparisons; making
that BF16 is not counted. Without a CUDA device its requests for pinned memory are turned into ordinary ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from common import GB, KCONVERT, Child, alternate, machine, run, spread, table, verdict
from peers import DISK, Contest, int4_source, peer_arguments

TARGET, TARGET_MB = 15.0, 900
PEER_NAME = "convert_cpu_weights.py, BF16"
PEER = """
import runpy, sys, torch
def unpinned(function):
    return lambda *args, pin_memory=False, **options: function(*args, **options)
if not torch.cuda.is_available():
    for name in ("zeros", "empty", "full"):
        setattr(torch, name, unpinned(getattr(torch, name)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    parser = peer_arguments(__doc__, model_gb=1.41)  # 16 experts
    parser.add_argument(
        "--converter", type=Path, help="convert_cpu_weights.py of kt-kernel [only kconvert is measured]"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has kt-kernel [this one]")
    parser.add_argument("--method", choices=["int4", "int8"], default="int4", help="[int4]")
    parser.add_argument("--numa", type=int, default=1, help="NUMA nodes [1]")
    options = parser.parse_args()
    if options.converter and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        sys.exit("kt-kernel packs only on a CPU with AVX-512, and this one has none; leave out --converter")
    int4 = int4_source(options)
    bf16 = int4.with_name(f"{int4.name}-bf16")
    if not (bf16 / "config.json").exists():
        print(f"making {bf16} …", flush=True)
        run([KCONVERT, "int4-to-bf16", int4, bf16, "-q"])
    target = options.dir / "amx"
    settings = ["--method", f"AMX{options.method.upper()}", "--numa", str(options.numa), "--json"]

    def ours(source: Path, scales: str) -> Callable[[], Child]:
        command = [KCONVERT, "repack-amx", source, target, *settings, "--scales", scales]
        return Contest(source, target).side(*command)

    sides = {
        f"{name}, {scales}": ours(s, scales)
        for name, s in (("BF16", bf16), ("INT4", int4))
        for scales in ("amax", "mse")
    }
    if options.converter:
        theirs = [options.peer_python, "-c", PEER, options.converter, "--input-path", bf16, "--input-type", "bf16"]
        theirs += ["--output", target, "--quant-method", options.method, "--threadpool-count", str(options.numa)]
        contest = Contest(bf16, target)
        sides[PEER_NAME] = contest.side(*theirs)
        sides[DISK] = contest.disk
    report(alternate(options.runs, sides), weights_bytes(bf16))
    if not options.converter:
        print("kt-kernel's converter was not measured: give --converter, on a CPU with AVX-512")
    machine(options.dir)


def weights_bytes(bf16: Path) -> int:
    return sum(path.stat().st_size for path in bf16.glob("*.safetensors"))


def report(results: Mapping[str, list[Child]], nbytes: int) -> None:
    rows = [
        [
            name,
            spread([child.seconds for child in children], 2, "s"),
            spread([nbytes / child.seconds / GB for child in children], 2, "GB/s"),
            spread([child.cpu for child in children], 1, "s"),
            spread([child.peak / 1e6 for child in children], 0, "MB"),
        ]
        for name, children in results.items()
    ]
    print(f"\n{nbytes / GB:.2f} GB of BF16, median (min-max); throughput in BF16, whatever the source", end="")
    table(["", "wall time", "throughput", "CPU time", "peak RSS"], rows)
    for name, children in results.items():
        if name in (PEER_NAME, DISK):
            continue
        peak = median(child.peak / 1e6 for child in children)
        print(f"{name}: peak RSS {peak:.0f} MB  {verdict(peak, TARGET_MB, 'MB')}")
        if PEER_NAME in results:
            pairs = zip(children, results[PEER_NAME], strict=True)
            ratios = [peer.seconds / own.seconds for own, peer in pairs]
            print(
                f"  throughput, pair by pair: {spread(ratios, 1)} x  {verdict(median(ratios), TARGET, 'x', at_most=False)}"
            )
    if PEER_NAME in results:
        most = [peer.seconds / disk.seconds for peer, disk in zip(results[PEER_NAME], results[DISK], strict=True)]
        print(f"two dd's, BF16 in and AMX out: the most this disk allows is {spread(most, 1)} x")


if __name__ == "__main__":
    main()
