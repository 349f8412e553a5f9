"""`kconvert verify` of INT4 weights and what was made of them against reading the same bytes with `dd`; memory, and reports.

Time of the cores is also given for each element of the weights, so many ns of one core, without what Python and torch take
to start: that of verifying a tiny checkpoint. How close a pair comes to the disk's speed depends on the number of cores.
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
    remove,
    run,
    sample,
    spread,
    table,
    tensor_files,
    verdict,
)

TARGET_MB = 900
TINY = ["--experts=2", "--hidden=256", "--moe-intermediate=128", "--heads=2", "--q-rank=32", "--kv-rank=32"]
SOURCE = ["--layers=1", "--dense-layers=0", "--vocab=1024"]
# Each is made of the INT4 source but `int4`, which is made of `bf16` and equals the source.
COMMANDS = {
    "bf16": ["int4-to-bf16"],
    "fp8": ["int4-to-fp8"],
    "int4": ["bf16-to-int4"],
    "amxint4": ["repack-amx", "--method=AMXINT4", "--numa=2"],
    "amxint8": ["repack-amx", "--method=AMXINT8", "--numa=2"],
}


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=16, help="of the layer that is compared [16]")
    parser.add_argument("--pairs", nargs="*", choices=COMMANDS, default=list(COMMANDS), help="only these outputs")
    options = parser.parse_args()
    source = sample(options.dir, f"verify-{options.experts}-experts", *SOURCE, f"--experts={options.experts}")
    wanted = {*options.pairs, *(["bf16"] if "int4" in options.pairs else [])}
    outputs = {name: source.with_name(f"{source.name}-{name}") for name in COMMANDS if name in wanted}
    for name, output in outputs.items():
        command, *terms = COMMANDS[name]
        made_of = outputs["bf16"] if name == "int4" else source
        run([KCONVERT, command, made_of, output, "-q", "--overwrite", *terms])
    report = options.dir / "verify-report.html"
    for name in options.pairs:
        compare(name, source, outputs[name], report, options.runs)
    machine(options.dir)
    for path in (*outputs.values(), report):
        remove(path)


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
    start = median(child.cpu for child in results["start"])
    rows = []
    for side, children in results.items():
        verifies = side.startswith("verify")
        rows.append(
            [
                side,
                f"{size / GB:.1f} GB" if side != "start" else "",
                spread([child.seconds for child in children], 1, "s"),
                spread([size / child.seconds / GB for child in children], 2, "GB/s") if side != "start" else "",
                spread([(child.cpu - start) / elements * 1e9 for child in children], 1, "ns") if verifies else "",
                spread([child.peak / 1e6 for child in children], 0, "MB"),
            ]
        )
    table(["what", "read", "wall time", "speed", "CPU an element", "peak RSS"], rows)
    peak = max(median(child.peak / 1e6 for child in children) for children in results.values())
    print(f"peak RSS {peak:.0f} MB  {verdict(peak, TARGET_MB, 'MB')}")


def verify(source: Path, output: Path, *options: str | Path) -> Child:
    make_cold(source, output)
    return run([KCONVERT, "verify", source, output, "-q", *options])


def read(*checkpoints: Path) -> Child:
    make_cold(*checkpoints)
    files = " ".join(str(file) for checkpoint in checkpoints for file in tensor_files(checkpoint))
    return run(["sh", "-c", f"for file in {files}; do dd if=$file of=/dev/null bs=4M iflag=direct status=none; done"])


if __name__ == "__main__":
    main()
