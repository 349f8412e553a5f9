"""What INT4 -> BF16 reads of the disk, by the system's own account, and how it fares where every read waits.

Files are cold, and each conversion is a fresh process. With `--base DIR`, the checkout of another build, that one runs side by
side; `--read-latency` is what every read then waits in addition, as on a store that is slow at random reads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from common import (
    GB,
    Child,
    alternate,
    arguments,
    convert_cold,
    machine,
    nbytes,
    spread,
    table,
    tensor_files,
    true_experts,
    verdict,
)

MOST = 1.005
CHILD = """
import json, pathlib, sys, time
base, latency, *command = sys.argv[1:]
if base:
    sys.path.insert(0, base + "/convert")
from kconvert.checkpoint.source import Reader
fill = Reader._fill
def waiting(*arguments):
    time.sleep(float(latency))
    return fill(*arguments)
if float(latency):
    Reader._fill = waiting
from kconvert.cli import main
main(command, standalone_mode=False)
counts = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
print(counts["read_bytes"])
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model-gb", type=float, default=8.5, help="size of the model in BF16 [8.5]")
    parser.add_argument(
        "--read-latency", type=float, default=0, metavar="MS", help="milliseconds that each read waits [0]"
    )
    parser.add_argument("--base", type=Path, help="checkout of another build")
    options = parser.parse_args()
    source, target = true_experts(options.dir, options.model_gb), options.dir / "read-once"

    def convert(base: str) -> Child:
        latency = str(options.read_latency / 1000)
        command = [sys.executable, "-c", CHILD, base, latency, "int4-to-bf16", source, target, "-q"]
        return convert_cold(command, source, target)[0]

    sides = {"kconvert": lambda: convert("")}
    if options.base:
        sides["the other build"] = lambda: convert(str(options.base.resolve()))
    results = alternate(options.runs, sides)
    size = nbytes(tensor_files(source))
    rows = [
        [
            name,
            spread([child.seconds for child in children], 2, "s"),
            spread([int(child.stdout) / size for child in children], 4),
        ]
        for name, children in results.items()
    ]
    print(f"\n{size / GB:.2f} GB of INT4, {options.runs} runs each, each read waits {options.read_latency} ms", end="")
    table(["", "wall time", "bytes read / bytes there"], rows)
    print(verdict(median([int(child.stdout) / size for child in results["kconvert"]]), MOST))
    if options.base:
        pairs = zip(results["the other build"], results["kconvert"], strict=True)
        print(
            f"the other build / kconvert, pair by pair: {spread([other.seconds / ours.seconds for other, ours in pairs])}"
        )
    machine(options.dir)


if __name__ == "__main__":
    main()
