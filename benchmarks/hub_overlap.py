"""Download-and-convert against the longer of a download alone and a conversion alone.

The Hub is the tests', on 127.0.0.1, and slowed down so that the download takes about as long as the conversion: then there
is most to gain from doing both at once. The download alone is huggingface_hub's snapshot_download.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median

from common import (
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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hub"))
from server import Hub

TARGET = 1.15
CONNECTIONS = 4  # that both sides use
REPO = "moonshotai/Cut-K2"
DOWNLOAD = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r}, max_workers={CONNECTIONS})"


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=96, help="of the one layer that is converted [96]")
    options = parser.parse_args()
    shape = ["--layers=1", "--dense-layers=0", "--vocab=1024", "--shard-size=200MB", f"--experts={options.experts}"]
    source = sample(options.dir, f"hub-overlap-{options.experts}", *shape)
    home, output = options.dir / "hub-home", options.dir / "hub-bf16"

    def convert(origin: str | Path, *budget: str) -> Child:
        remove(output)
        remove(home)
        make_cold(source)
        return run([KCONVERT, "int4-to-bf16", origin, output, "-q", "--shard-size=500MB", *budget])

    def download() -> Child:
        remove(home)
        make_cold(source)
        return run([sys.executable, "-c", DOWNLOAD])

    with Hub() as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")
        hub.add(REPO, source)
        alone = convert(source).seconds
        hub.speed = nbytes(tensor_files(source)) / alone / CONNECTIONS
        sides = {
            "download": download,
            "convert": lambda: convert(source),
            "download and convert": lambda: convert(REPO, "--disk-budget=1TB"),
        }
        results = alternate(options.runs, sides)
    remove(home)
    remove(output)
    table(
        ["", "wall time"], [[name, spread([c.seconds for c in children], 1, "s")] for name, children in results.items()]
    )
    seconds = [[child.seconds for child in children] for children in results.values()]
    ratios = [both / max(one, other) for one, other, both in zip(*seconds, strict=True)]
    print(f"to the longer of the two: {spread(ratios)} {verdict(median(ratios), TARGET)}")
    machine(options.dir)


if __name__ == "__main__":
    main()
