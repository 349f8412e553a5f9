"""`--to mlx` beside mlx-lm's own way from the same INT4 checkpoint, both in fresh processes that find it cold.

Both write affine integers of 4 bits in groups of 32, of which the script compares every stack of experts. kconvert's time ends
when all is on the disk, mlx-lm's when it is in the page cache.

    pip install 'kconvert-toolkit[mlx]'
    python benchmarks/mlx_convert.py [--dir DIR] [--model-gb 2]
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from common import (
    GB,
    KCONVERT,
    Child,
    alternate,
    arguments,
    figures,
    machine,
    make_cold,
    nbytes,
    remove,
    run,
    spread,
    table,
    tensor_files,
    true_experts,
    verdict,
)

TARGET = 5
THEIRS = ["-m", "mlx_lm", "convert", "--trust-remote-code"]  # which is `sample`'s own
COMPARE = """
import sys
from pathlib import Path
import mlx.core as mx
sides = [{k: v for f in sorted(Path(p).glob("*.safetensors")) for k, v in mx.load(str(f)).items()} for p in sys.argv[1:]]
names = [name for name in sides[0] if "switch_mlp" in name]
assert names and all(mx.array_equal(sides[0][name], sides[1][name]) for name in names), "they differ"
print(len(names))
"""


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--model-gb", type=float, default=2, help="size of the model in BF16 [2]")
    options = parser.parse_args()
    source = true_experts(options.dir, options.model_gb)
    ours, theirs = options.dir / "mlx-kconvert", options.dir / "mlx-lm"

    def kconvert() -> Child:
        return cold(source, ours, [KCONVERT, "convert", source, ours, "--to", "mlx", "-q"])

    def mlx_lm() -> Child:
        return cold(source, theirs, [sys.executable, *THEIRS, "--hf-path", source, "--mlx-path", theirs])

    results = alternate(options.runs, {"kconvert": kconvert, "mlx-lm": mlx_lm})
    same = run([sys.executable, "-c", COMPARE, ours, theirs]).stdout.strip()
    written = nbytes(tensor_files(ours))
    rows = [[name, *figures(children, 2)] for name, children in results.items()]
    print(
        f"\nread {nbytes(tensor_files(source)) / GB:.2f} GB, wrote {written / GB:.2f} GB; {same} tensors of stacks are equal"
    )
    table(["", "wall time", "CPU", "peak RSS"], rows)
    ratios = [b.seconds / a.seconds for a, b in zip(results["kconvert"], results["mlx-lm"], strict=True)]
    print(f"mlx-lm / kconvert, pair by pair: {spread(ratios)}  {verdict(median(ratios), TARGET, at_most=False)}")
    machine(options.dir)
    remove(ours)
    remove(theirs)


def cold(source: Path, target: Path, command: list[str | Path]) -> Child:
    remove(target)
    make_cold(source)
    return run(command)


if __name__ == "__main__":
    main()
