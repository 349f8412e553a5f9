"""`kconvert check` against what bounds it: the disk, read by `dd` of the same files to /dev/null, and sha256 on all cores.

All find the files cold, and dd passes the page cache. The time of starting, that of a check of a tiny checkpoint, counts as
kconvert's. sha256 is hashlib's, of as many bytes in memory as the files have, a thread a core. Each ratio is that of
neighbouring runs, to the slower of the two.
"""

from __future__ import annotations

import shlex
import sys
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
    run,
    spread,
    table,
    tensor_files,
    true_experts,
    verdict,
)

TARGET = 1.1
CONVERSIONS = {"bf16": ["int4-to-bf16"], "gguf": ["convert", "--to", "gguf"]}
HASH = """
import hashlib, os, sys
from concurrent.futures import ThreadPoolExecutor
cores = len(os.sched_getaffinity(0))
block = bytes(8 << 20)
def work(count):
    digest = hashlib.sha256()
    for _ in range(count):
        digest.update(block)
blocks = int(sys.argv[1]) // len(block)
with ThreadPoolExecutor(cores) as pool:
    list(pool.map(work, [blocks // cores] * cores))
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model-gb", type=float, default=4, help="size of the model in BF16 [4]")
    parser.add_argument("--container", choices=CONVERSIONS, default="bf16", help="what is checked [bf16]")
    options = parser.parse_args()
    source = true_experts(options.dir, options.model_gb)
    output = source.with_name(f"{source.name}-{options.container}")
    proof = output.with_name(f"{output.name}.json")
    if not proof.exists():
        name, *terms = CONVERSIONS[options.container]
        run([KCONVERT, name, source, output, "-q", "--overwrite", *terms])
        run([KCONVERT, "verify", source, output, "-q", "--certificate", proof])
    files = tensor_files(output)
    size = nbytes(files)

    def check() -> Child:
        make_cold(output)
        return run([KCONVERT, "check", output, proof, "-q"])

    def read() -> Child:
        make_cold(output)
        names = " ".join(shlex.quote(str(file)) for file in files)
        return run(
            ["sh", "-c", f"for file in {names}; do dd if=$file of=/dev/null bs=8M iflag=direct status=none; done"]
        )

    sides = {"kconvert check": check, "dd": read, "sha256": lambda: run([sys.executable, "-c", HASH, str(size)])}
    results = alternate(options.runs, sides)
    rows = [
        [
            name,
            spread([child.seconds for child in children], 2, "s"),
            spread([size / child.seconds / GB for child in children], 2, "GB/s"),
        ]
        for name, children in results.items()
    ]
    print(f"\n{Path(output).name}: {size / GB:.2f} GB, {options.runs} runs each: median (min-max)", end="")
    table(["", "wall time", "speed"], rows)
    triples = zip(*results.values(), strict=True)
    ratios = [ours.seconds / max(dd.seconds, sha.seconds) for ours, dd, sha in triples]
    print(f"peak RSS: {spread([child.peak / 1e6 for child in results['kconvert check']], 0, 'MB')}")
    print(f"check / the slower of dd and sha256, run by run: {spread(ratios)}  {verdict(median(ratios), TARGET)}")
    machine(options.dir)


if __name__ == "__main__":
    main()
