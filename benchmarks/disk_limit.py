"""A conversion against the limit of the disk: the same bytes read and written in the same pattern, without any arithmetic.

What bounds a conversion is looked for by trying: threads that read and write by turns, as kconvert's workers do, and one thread
that keeps many requests in an io_uring; both with several sizes of requests, from huge aligned buffers past the page cache into
a file that has its room already, up to the fsync. The best of them runs side by side with kconvert, pair by pair. Beside it
stand threads that add something to every number on its way to the disk, which no conversion does with less, the best while
another process adds to numbers in its cache, or all over memory, through which all of it has to pass, and fio's figure where it
is installed.

    pip install liburing        # else threads alone
    python benchmarks/disk_limit.py [--job int4-to-bf16] [--model-gb 17]
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from common import (
    GB,
    Child,
    alternate,
    arguments,
    convert_cold,
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
from disk_speed import JOBS, command, source_of

TARGET = 1.1
MIB = 1 << 20
TOUCHING = "touching-8x8"
BESIDE = {"its cache": 1 << 16, "memory": 1 << 26}  # bytes that another process adds to meanwhile
WAYS = [f"{way}-{depth}x{size}" for way in ("threads", "uring") for depth, size in ((8, 4), (8, 8), (8, 16), (16, 8))]


class Piece(NamedTuple):
    """What is read at a time, and what is written for it; whole pages."""

    file: int
    start: int
    nbytes: int
    at: int
    written: int


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model-gb", type=float, default=17, help="size of the model in BF16 [17]")
    parser.add_argument("--job", choices=JOBS, default="int4-to-bf16", help="the command measured [int4-to-bf16]")
    parser.add_argument(
        "--move", nargs=4, metavar=("WAY", "SRC", "DST", "BYTES"), help="what a child of this script does"
    )
    parser.add_argument("--add", type=int, metavar="BYTES", help="what another child does, to numbers of so many bytes")
    options = parser.parse_args()
    if options.add:
        add(options.add)
    if options.move:
        way, source, target, size = options.move
        move(way, tensor_files(Path(source)), Path(target), int(size))
        return
    source = source_of(options.job, true_experts(options.dir, options.model_gb))
    converted, moved = options.dir / "limit-converted", options.dir / "limit-moved"

    def convert() -> Child:
        result, written = convert_cold([*command(options.job, source, converted), "-q"], source, converted)
        sizes.append(written)
        return result

    def by(way: str) -> Child:
        make_cold(source)
        result = run([sys.executable, __file__, "--move", way, source, moved, str(sizes[-1])])
        remove(moved)
        return result

    def beside(size: int) -> Child:
        with subprocess.Popen([sys.executable, __file__, "--add", str(size)]) as other:
            try:
                return by(best)
            finally:
                other.kill()

    sizes: list[int] = []
    convert()
    ways = WAYS if has_uring() else [way for way in WAYS if way.startswith("threads")]
    tried = {way: by(way).seconds for way in ways}
    table(["way, requests at a time x MiB", "wall time"], [[way, f"{seconds:.2f} s"] for way, seconds in tried.items()])
    best = min(tried, key=lambda way: tried[way])
    others = {f"{best} beside {where}": partial(beside, size) for where, size in BESIDE.items()}
    sides = {"kconvert": convert, best: partial(by, best), TOUCHING: partial(by, TOUCHING), **others}
    results = alternate(options.runs, sides)
    read, written = nbytes(tensor_files(source)), sizes[-1]
    rows = [
        [
            name,
            spread([child.seconds for child in runs], 2, "s"),
            f"{(read + written) / GB / median([c.seconds for c in runs]):.2f}",
        ]
        for name, runs in results.items()
    ]
    print(f"\nread {read / GB:.2f} GB, wrote {written / GB:.2f} GB, {options.runs} runs each: median (min-max)", end="")
    table(["", "wall time", "GB/s, read and written"], rows)
    ours = ratios(results["kconvert"], results[best])
    print(f"kconvert / the best way, pair by pair: {spread(ours)}  {verdict(median(ours), TARGET)}")
    for side in (TOUCHING, *others):
        print(f"{side} / the best way, pair by pair: {spread(ratios(results[side], results[best]))}")
    if shutil.which("fio"):
        print(fio(options.dir, read, written))
    machine(options.dir)


def ratios(ours: list[Child], theirs: list[Child]) -> list[float]:
    return [one.seconds / two.seconds for one, two in zip(ours, theirs, strict=True)]


def add(size: int) -> None:
    """To numbers of so many bytes, a part at a time, until this process is killed."""
    import numpy as np

    numbers = np.zeros((size // BESIDE["its cache"], BESIDE["its cache"] // 2), np.uint16)
    while True:
        for part in numbers:
            np.add(part, 1, out=part)


def has_uring() -> bool:
    """Whether it is installed and runs: its wheel has instructions that not every processor has."""
    asked = subprocess.run([sys.executable, "-c", "import liburing; liburing.Ring()"], capture_output=True, check=False)
    if asked.returncode:
        print("io_uring is left out: pip install liburing, on a processor with AVX-512")
    return not asked.returncode


def move(way: str, sources: list[Path], target: Path, size: int) -> None:
    """Read `sources` and write `size` bytes of anything to `target`."""
    name, _, numbers = way.partition("-")
    depth, mebibytes = map(int, numbers.split("x"))
    files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in sources]
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    os.posix_fallocate(out, 0, size)
    pieces = cut(sources, size, mebibytes * MIB)
    buffers = [buffer(mebibytes * MIB) for _ in range(depth)]
    if name == "uring":
        by_uring(pieces, files, out, buffers)
    else:
        by_threads(pieces, files, out, buffers, name == "touching")
    os.fsync(out)


def cut(sources: list[Path], size: int, most: int) -> Iterator[Piece]:
    """Pieces of which neither what is read nor what is written is more than `most`."""
    total, at, seen = sum(path.stat().st_size for path in sources), 0, 0
    step = most if size <= total else most * total // size
    step = max(step // mmap.PAGESIZE, 1) * mmap.PAGESIZE
    for file, path in enumerate(sources):
        length = path.stat().st_size
        for start in range(0, length, step):
            seen += min(step, length - start)
            stop = size * seen // total // mmap.PAGESIZE * mmap.PAGESIZE
            yield Piece(file, start, step, at, stop - at)
            at = stop


def buffer(size: int) -> mmap.mmap:
    """Huge pages where the system gives them, all of them there."""
    memory = mmap.mmap(-1, size + 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(len(memory)))
    return memory


def by_threads(pieces: Iterator[Piece], files: list[int], out: int, buffers: list[mmap.mmap], touching: bool) -> None:
    lock = threading.Lock()
    if touching:
        import numpy as np

    def work(room: memoryview) -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            os.preadv(files[piece.file], [room[: piece.nbytes]], piece.start)
            if touching:
                numbers = np.frombuffer(room[: piece.written], np.uint16)
                np.add(numbers, 1, out=numbers)
            os.pwrite(out, room[: piece.written], piece.at)

    workers = [threading.Thread(target=work, args=(memoryview(memory),)) for memory in buffers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def by_uring(pieces: Iterator[Piece], files: list[int], out: int, buffers: list[mmap.mmap]) -> None:
    import liburing as uring

    ring, done = uring.Ring(), uring.Cqe()
    uring.io_uring_queue_init(2 * len(buffers), ring)
    at_work: dict[int, Piece | None] = {}  # by slot: what is being read, None where that is being written
    vectors: dict[int, Any] = {}  # which must live as long as the request

    def ask(slot: int, ready: Piece | None) -> None:
        """Write `ready`, which has been read; without it read the next piece, if there is one."""
        piece = ready or next(pieces, None)
        if piece is None:
            return
        request, room = uring.io_uring_get_sqe(ring), memoryview(buffers[slot])
        if ready is None:
            vectors[slot] = uring.Iovec([room[: piece.nbytes]])
            uring.io_uring_prep_readv(request, files[piece.file], vectors[slot], piece.start)
        else:
            vectors[slot] = uring.Iovec([room[: piece.written]])
            uring.io_uring_prep_writev(request, out, vectors[slot], piece.at)
        uring.io_uring_sqe_set_data64(request, slot + 1)
        at_work[slot] = piece if ready is None else None

    for slot in range(len(buffers)):
        ask(slot, None)
    while at_work:
        uring.io_uring_submit_and_wait(ring, 1)
        uring.io_uring_wait_cqe(ring, done)
        entry = done[0]
        if entry.res < 0:
            raise OSError(-entry.res, os.strerror(-entry.res))
        slot = entry.user_data - 1
        uring.io_uring_cq_advance(ring, 1)
        ask(slot, at_work.pop(slot))
    uring.io_uring_queue_exit(ring)


def fio(directory: Path, read: int, written: int) -> str:
    """What fio makes of a reader and a writer at once."""
    common = ["--direct=1", "--bs=8M", "--iodepth=8", "--ioengine=libaio", f"--directory={directory}", "--unlink=1"]
    jobs = [
        "--name=in",
        "--rw=read",
        f"--size={read}",
        "--name=out",
        "--rw=write",
        f"--size={written}",
        "--end_fsync=1",
    ]
    return run(["fio", *common, *jobs]).stdout


if __name__ == "__main__":
    main()
