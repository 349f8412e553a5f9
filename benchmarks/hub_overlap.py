"""Download-and-convert against the longer of a download alone and a conversion alone.

The Hub is the tests', on 127.0.0.1 and in a process of its own, behind a line of limited speed that its connections share.
By default the download takes about as long as the conversion: then there is most to gain from doing both at once. The
download alone is huggingface_hub's snapshot_download, which does not check digests. The source has as many files as
Kimi-K2-Thinking, so that waiting for the first and finishing the last weigh as they do there.

--parts says instead where the CPU time of a download goes, for each GB: receiving, the digest, writing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

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
    serving,
    spread,
    table,
    tensor_files,
    verdict,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hub"))
from server import Hub

if TYPE_CHECKING:
    from kconvert.checkpoint.remote import RemoteCheckpoint

TARGET = 1.05
TARGET_CPU = 1.0  # seconds for each GB
CONNECTIONS = 4  # that both sides use
EXPERT = 24_772_632  # bytes of an INT4 expert
REPO = "moonshotai/Cut-K2"
DOWNLOAD = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r}, max_workers={CONNECTIONS})"


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=96, help="of the one layer that is converted [96]")
    parser.add_argument("--shards", type=int, default=62, help="of the source, about [62]")
    parser.add_argument("--gbit", type=float, help="speed of the line in Gbit/s [as fast as the conversion]")
    parser.add_argument("--parts", action="store_true", help="measure the CPU time of a download by its parts")
    parser.add_argument("--part", choices=PARTS, help="what a child of this script does")
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](options.dir)
        return
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

    if options.parts:
        with serving(serve, source, 0) as url:
            os.environ["HF_ENDPOINT"] = url
            report_parts(alternate(options.runs, sides_of_parts(options.dir, home)), nbytes(tensor_files(source)))
        return
    speed = options.gbit * 1e9 / 8 if options.gbit else nbytes(tensor_files(source)) / convert(source).seconds
    sides = {
        "download": download,
        "convert": lambda: convert(source),
        "download and convert": lambda: convert(REPO, "--disk-budget=1TB"),
    }
    with serving(serve, source, speed) as url:
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


def sides_of_parts(folder: Path, home: Path) -> dict[str, Callable[[], Child]]:
    def side(command: list[str]) -> Child:
        remove(home)
        remove(folder / "hub-parts")
        return run(command)

    ours = {
        name: lambda name=name: side([sys.executable, __file__, "--dir", str(folder), "--part", name]) for name in PARTS
    }
    return ours | {"snapshot_download": lambda: side([sys.executable, "-c", DOWNLOAD])}


def report_parts(results: dict[str, list[Child]], size: int) -> None:
    start = median(child.cpu for child in results["start"])
    costs = {name: [(child.cpu - start) * 1e9 / size for child in found] for name, found in results.items()}
    walls = {name: spread([child.seconds for child in found], 1, "s") for name, found in results.items()}
    print(f"\n{size / 1e9:.2f} GB; each line has what stands above it, but for the last")
    table(["", "CPU time a GB", "wall time"], [[name, spread(costs[name], 2, "s"), walls[name]] for name in results])
    whole = median(costs["and written"])
    print(f"CPU time for each GB downloaded: {whole:.2f} s {verdict(whole, TARGET_CPU, 's')}")


def opened() -> RemoteCheckpoint:
    from kconvert.address import open_checkpoint
    from kconvert.checkpoint.remote import RemoteCheckpoint

    source = open_checkpoint(REPO)
    assert isinstance(source, RemoteCheckpoint)
    return source


def receive(folder: Path, digesting: bool = False) -> None:
    """Bring all files, each to the same memory, and look at their digests, or not."""
    from kconvert.checkpoint import download

    source = opened()

    def bring(file: str) -> None:
        digest, room = source.digest(file), memoryview(bytearray(download.PIECE))

        class Nowhere:
            filled = 0

            def room(self) -> memoryview:
                return room[self.filled :]

            def took(self, count: int) -> None:
                self.filled += count
                if self.filled == len(room):
                    self.empty()

            def empty(self) -> None:
                if digesting:
                    digest.update(room[: self.filled])
                self.filled = 0

        sink = Nowhere()
        source.transfer(file, 0, source.files[file].nbytes, sink)
        sink.empty()
        assert digest.agrees() or not digesting

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(bring, source.files))


def fetch(folder: Path) -> None:
    """Bring all files to the disk, as a conversion does."""
    from kconvert.checkpoint.download import Fetch, Line
    from kconvert.checkpoint.download import fetch as bring

    source, line = opened(), Line(CONNECTIONS)

    def whole(file: str) -> None:
        stat, target = source.files[file], folder / "hub-parts" / file
        bring(
            source,
            Fetch(file, stat, ((0, stat.nbytes),)),
            target,
            target.with_suffix(".part"),
            line.turn(threading.Event()),
        )

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(whole, source.files))
    remove(folder / "hub-parts")


PARTS: dict[str, Callable[[Path], object]] = {
    "start": lambda folder: opened(),
    "received": receive,
    "and digested": lambda folder: receive(folder, digesting=True),
    "and written": fetch,
}


def serve(source: Path, speed: float, pipe: Connection) -> None:
    with Hub() as hub:
        hub.speed = speed
        hub.add(REPO, source)
        pipe.send(hub.url)
        pipe.recv()


if __name__ == "__main__":
    main()
