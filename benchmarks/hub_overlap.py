"""Download-and-convert against the longer of a download alone and a conversion alone.

The Hub is the tests', on 127.0.0.1 and in a process of its own, behind a line of limited speed that its connections share.
By default the download takes about as long as the conversion: then there is most to gain from doing both at once. The
download alone is huggingface_hub's snapshot_download, which does not check digests. The source has as many files as
Kimi-K2-Thinking, so that waiting for the first and finishing the last weigh as they do there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
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
EXPERT = 24_772_632  # bytes of an INT4 expert
REPO = "moonshotai/Cut-K2"
DOWNLOAD = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r}, max_workers={CONNECTIONS})"


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=96, help="of the one layer that is converted [96]")
    parser.add_argument("--shards", type=int, default=62, help="of the source, about [62]")
    parser.add_argument("--gbit", type=float, help="speed of the line in Gbit/s [as fast as the conversion]")
    options = parser.parse_args()
    shard = f"--shard-size={options.experts * EXPERT // options.shards}"
    shape = ["--layers=1", "--dense-layers=0", "--vocab=1024", shard, f"--experts={options.experts}"]
    source = sample(options.dir, f"hub-overlap-{options.experts}-{options.shards}", *shape)
    home, output = options.dir / "hub-home", options.dir / "hub-bf16"
    os.environ.update(HF_HOME=str(home), HF_HUB_DISABLE_XET="1")

    def convert(origin: str | Path, *budget: str) -> Child:
        remove(output)
        remove(home)
        make_cold(source)
        return run([KCONVERT, "int4-to-bf16", origin, output, "-q", "--shard-size=500MB", *budget])

    def download() -> Child:
        remove(home)
        make_cold(source)
        return run([sys.executable, "-c", DOWNLOAD])

    speed = options.gbit * 1e9 / 8 if options.gbit else nbytes(tensor_files(source)) / convert(source).seconds
    sides = {
        "download": download,
        "convert": lambda: convert(source),
        "download and convert": lambda: convert(REPO, "--disk-budget=1TB"),
    }
    with serving(source, speed) as url:
        os.environ["HF_ENDPOINT"] = url
        results = alternate(options.runs, sides)
    remove(home)
    remove(output)
    print(
        f"\n{nbytes(tensor_files(source)) / 1e9:.2f} GB in {len(tensor_files(source))} files at {speed / 1e6:.0f} MB/s"
    )
    rows = [
        [name, spread([c.seconds for c in children], 1, "s"), spread([c.cpu for c in children], 1, "s")]
        for name, children in results.items()
    ]
    table(["", "wall time", "CPU time"], rows)
    seconds = [[child.seconds for child in children] for children in results.values()]
    ratios = [both / max(one, other) for one, other, both in zip(*seconds, strict=True)]
    print(f"to the longer of the two: {spread(ratios)} {verdict(median(ratios), TARGET)}")
    machine(options.dir)


@contextmanager
def serving(source: Path, speed: float) -> Iterator[str]:
    """The endpoint of a Hub in a process of its own, which no side has to wait for."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(source, speed, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("stop")
        process.join()


def serve(source: Path, speed: float, pipe: Connection) -> None:
    with Hub() as hub:
        hub.speed = speed
        hub.add(REPO, source)
        pipe.send(hub.url)
        pipe.recv()


if __name__ == "__main__":
    main()
