"""Peak RSS of INT4 -> BF16 for a shard of 1 GB and for a true one of 9.8 GB: one whole layer of Kimi-K2, in one file.

The big one writes 34 GB and needs 45 GB of free disk; it is left out, and says so, where there is less. Everything that
this makes is removed at the end.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median

from common import (
    GB,
    KCONVERT,
    Child,
    alternate,
    arguments,
    convert_cold,
    machine,
    nbytes,
    remove,
    sample,
    spread,
    table,
    tensor_files,
    verdict,
)

TARGET_MB = 300
INT4_GB, BF16_GB, REST_GB = 0.02477, 0.08808, 0.29  # of an expert, and of the rest of a layer
LAYER = ["--layers=1", "--dense-layers=0", "--vocab=1024", "--shard-size=100GB"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[28, 384], help="of the layers measured [28 384]")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    sources: dict[str, Path] = {}
    written: dict[str, int] = {}
    try:
        for experts in options.experts:
            if not room(options.dir, experts):
                continue
            source = sample(options.dir, f"memory-{experts}-experts", *LAYER, f"--experts={experts}")
            sources[f"{nbytes(tensor_files(source)) / GB:.1f} GB shard"] = source
        sides = {name: lambda name=name: convert(name, sources[name], written) for name in sources}
        results = alternate(options.runs, sides)
    finally:
        for experts in options.experts:
            remove(options.dir / f"memory-{experts}-experts")
            remove(options.dir / f"memory-{experts}-experts-bf16")
    rows = [
        [
            name,
            f"{written[name] / GB:.1f} GB",
            spread([child.peak / 1e6 for child in children], 0, "MB"),
            spread([child.seconds for child in children], 1, "s"),
            spread([written[name] / child.seconds / GB for child in children], 2, "GB/s"),
        ]
        for name, children in results.items()
    ]
    table(["one file of input", "output", "peak RSS", "wall time", "written"], rows)
    for name, children in results.items():
        peak = median(child.peak / 1e6 for child in children)
        print(f"{name}: peak RSS {peak:.0f} MB  {verdict(peak, TARGET_MB, 'MB')}")
    machine(options.dir)


def room(folder: Path, experts: int) -> bool:
    """Whether the disk has room for source and output, with a little to spare; says so when not."""
    needed = (experts * (INT4_GB + BF16_GB) + 2 * REST_GB) * 1.02
    free = shutil.disk_usage(folder).free / GB
    if free < needed:
        print(
            f"left out: the layer of {experts} experts needs {needed:.0f} GB of disk, {folder} has {free:.0f} GB free"
        )
    return free >= needed


def convert(name: str, source: Path, written: dict[str, int]) -> Child:
    target = source.with_name(source.name + "-bf16")
    result, written[name] = convert_cold([KCONVERT, "int4-to-bf16", source, target, "-q"], source, target)
    return result


if __name__ == "__main__":
    main()
