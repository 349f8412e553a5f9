"""`kconvert verify` of a BF16 and an FP8 output against reading the same bytes with `dd`; memory, and what a report costs.

Verifying decodes both sides by compressed-tensors and torch, which takes more time of the cores than any disk takes to
read: how close it comes to the disk's speed depends on their number.
"""

from __future__ import annotations

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
    remove,
    run,
    sample,
    spread,
    table,
    tensor_files,
    verdict,
)

TARGET_MB = 900
SOURCE = ["--layers=1", "--dense-layers=0", "--vocab=1024"]
COMMANDS = {"bf16": "int4-to-bf16", "fp8": "int4-to-fp8"}


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=32, help="of the layer that is compared [32]")
    options = parser.parse_args()
    source = sample(options.dir, f"verify-{options.experts}-experts", *SOURCE, f"--experts={options.experts}")
    outputs = {name: source.with_name(f"{source.name}-{name}") for name in COMMANDS}
    for name, output in outputs.items():
        run([KCONVERT, COMMANDS[name], source, output, "-q", "--overwrite"])
    sides = {f"verify {name}": lambda output=output: verify(source, output) for name, output in outputs.items()}
    report = options.dir / "verify-report.html"
    sides["verify bf16 --report"] = lambda: verify(source, outputs["bf16"], "--report", report)
    sides["dd of both, bf16"] = lambda: read(source, outputs["bf16"])
    results = alternate(options.runs, sides)
    sizes = {name: nbytes(tensor_files(output)) + nbytes(tensor_files(source)) for name, output in outputs.items()}
    rows = []
    for name, children in results.items():
        size = sizes["fp8" if "fp8" in name else "bf16"]
        rows.append(
            [
                name,
                f"{size / GB:.1f} GB",
                spread([child.seconds for child in children], 1, "s"),
                spread([size / child.seconds / GB for child in children], 2, "GB/s"),
                spread([child.cpu for child in children], 1, "s"),
                spread([child.peak / 1e6 for child in children], 0, "MB"),
            ]
        )
    table(["what", "read", "wall time", "speed", "CPU", "peak RSS"], rows)
    peak = max(median(child.peak / 1e6 for child in children) for children in results.values())
    print(f"peak RSS {peak:.0f} MB  {verdict(peak, TARGET_MB, 'MB')}")
    machine(options.dir)
    for path in (*outputs.values(), report):
        remove(path)


def verify(source: Path, output: Path, *options: str | Path) -> Child:
    make_cold(source, output)
    return run([KCONVERT, "verify", source, output, "-q", *options])


def read(*checkpoints: Path) -> Child:
    make_cold(*checkpoints)
    files = " ".join(str(file) for checkpoint in checkpoints for file in tensor_files(checkpoint))
    return run(["sh", "-c", f"for file in {files}; do dd if=$file of=/dev/null bs=4M iflag=direct status=none; done"])


if __name__ == "__main__":
    main()
