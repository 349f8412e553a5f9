"""INT4 -> BF16 with more workers than cores, and the time that passes under Python's lock.

Workers: fresh processes on cold files, alternating, against those with eight. The lock: the same conversion by one thread, in
which reading, kernels and writing do nothing; what time that takes is Python's own, which threads cannot share.
"""

from __future__ import annotations

import sys
from statistics import median

from common import (
    GB,
    KCONVERT,
    Child,
    alternate,
    arguments,
    convert_cold,
    machine,
    remove,
    run,
    spread,
    table,
    true_experts,
    verdict,
)

WORKERS = (8, 16, 32, 64)
MOST_SECONDS = 0.05  # under the lock, for each GB of output
HOLLOW = """
import sys, time
from kconvert.checkpoint.source import Reader
from kconvert.formats.dense import Dense
from kconvert.formats.packed import Packed
from kconvert.run.writer import ShardWriter
import kconvert
def nothing(*arguments):
    return 0
fill = Reader._fill
def filled(*arguments):
    if arguments[-1] < 8192:  # a shape must be right
        fill(*arguments)
def counted(self, data, offset):
    self._remaining -= len(data)
    return self._remaining == 0
plan = kconvert.plan(sys.argv[1], kconvert.Recipe("bf16"))
Reader._fill, ShardWriter.write = filled, counted
Packed.decode = Dense.encode = nothing
seen = []
def advance(nbytes):
    seen.append(time.thread_time())
kconvert.convert(plan, sys.argv[2], threads=1, advance=advance)
print(seen[-1] - seen[1])  # the first is of what was there before
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model-gb", type=float, default=8.5, help="size of the model in BF16 [8.5]")
    options = parser.parse_args()
    source, target = true_experts(options.dir, options.model_gb), options.dir / "many-workers"

    def convert(workers: int) -> Child:
        command = [KCONVERT, "int4-to-bf16", source, target, "-q", f"--threads={workers}"]
        result, written = convert_cold(command, source, target)
        sizes.append(written)
        return result

    sizes: list[int] = []
    results = alternate(options.runs, {f"{count} workers": lambda count=count: convert(count) for count in WORKERS})
    few = results[f"{WORKERS[0]} workers"]
    rows = [
        [
            name,
            spread([child.seconds for child in children], 2, "s"),
            spread([child.cpu for child in children], 2, "s"),
            spread([child.seconds / base.seconds for child, base in zip(children, few, strict=True)]),
            spread([child.peak / 1e6 for child in children], 0, "MB"),
        ]
        for name, children in results.items()
    ]
    table(["", "wall time", "CPU", "to eight, pair by pair", "peak RSS"], rows)
    taken = []
    for _ in range(options.runs):
        taken.append(float(run([sys.executable, "-c", HOLLOW, source, target]).stdout) / (sizes[-1] / GB))
        remove(target)
    print(
        f"\nunder Python's lock, for each GB of output: {spread(taken, 3, 's')}  {verdict(median(taken), MOST_SECONDS)}"
    )
    machine(options.dir)


if __name__ == "__main__":
    main()
