"""Files that are elsewhere to the disk: whole ones checked against their digest, of others the byte ranges that are wanted.

A file grows from its beginning, ranges in ascending order with holes between them, so its length says what is there; a
process that is killed leaves a file that the next one goes on with.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kconvert.checkpoint.files import PAGE, allocate, open_direct, write_past_cache
from kconvert.checkpoint.listing import FileStat
from kconvert.checkpoint.remote import Digest, RemoteCheckpoint
from kconvert.errors import KconvertError, explain_os_error

ATTEMPTS = 3  # at a file whose digest is wrong
CHUNK = 1 << 20  # of a file that is read again
PIECE = 4 << 20  # of what arrives, before it is written
LONGEST_HELD = 0.5  # seconds that such a piece may take to come: what a killed process loses of a slow line

PERIOD = 0.5  # seconds that a number of connections is tried for
PERIODS = 20  # before another number is tried
GAIN = 1.1  # by which more of them must make the line faster

Extent = tuple[int, int]  # first byte, and the one after the last


@dataclass(frozen=True)
class Fetch:
    """What of a file is wanted; all of it when the extents are one from 0 to its size."""

    file: str
    stat: FileStat
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.extents)

    @property
    def is_whole(self) -> bool:
        return self.extents == ((0, self.stat.nbytes),)


class Line:
    """Which of several downloads receive: those that began first, and no more of them than make the line faster.

    So files come one after another. If four shared the line, the first would be there when all four are, and so would be the
    last, for which nothing else could be done meanwhile. How many it takes is found by trying, see `_counts`. While one
    writes what has come, another receives.
    """

    def __init__(self, most: int) -> None:
        self._changed = threading.Condition()
        self._numbers = count()
        self._eager: set[int] = set()  # numbers of downloads that would receive
        self._last = -1  # the last of them that may
        self._search = _counts(most)
        self._allowed = next(self._search)
        self._restart()

    def turn(self, stopped: threading.Event) -> Turn:
        """For another download."""
        return Turn(self, next(self._numbers), stopped)

    def enter(self, number: int, stopped: threading.Event) -> None:
        """Wait until this download may receive, or `stopped` is set."""
        if number in self._eager and number <= self._last:
            return
        with self._changed:
            if not self._eager and not self._nbytes:
                self._restart()  # the line had nothing to do
            self._eager.add(number)
            self._settle()
            while number > self._last and not stopped.is_set():
                self._changed.wait(PERIOD)
                self._measure()

    def leave(self, number: int) -> None:
        """This download has something else to do."""
        with self._changed:
            self._eager.discard(number)
            self._settle()

    def received(self, nbytes: int) -> None:
        """So many bytes have come to one of those that may receive."""
        self._nbytes += nbytes
        if time.monotonic() - self._began > PERIOD:
            with self._changed:
                self._measure()

    def _settle(self) -> None:
        self._last = max(sorted(self._eager)[: self._allowed], default=-1)
        self._changed.notify_all()

    def _measure(self) -> None:
        passed = time.monotonic() - self._began
        if passed > PERIOD:
            if self._eager:  # else nobody can say what the line would have done
                self._allowed = self._search.send(self._nbytes / passed)
                self._settle()
            self._restart()

    def _restart(self) -> None:
        self._nbytes, self._began = 0, time.monotonic()


@dataclass(frozen=True)
class Turn:
    """One download's: when it may receive, and whether it is to end."""

    line: Line
    number: int
    stopped: threading.Event

    def begin(self) -> None:
        """Wait until it may receive, or is to end."""
        self.line.enter(self.number, self.stopped)

    def end(self) -> None:
        """It has something else to do."""
        self.line.leave(self.number)


def _counts(most: int) -> Generator[int, float, None]:
    """How many connections to have for the next while, up to `most`; to be sent the speed that they had together.

    One more is kept if it makes them faster, one less if that makes them no slower.
    """
    number, speed = 1, (yield 1)
    while True:
        while number < most and (tried := (yield number + 1)) > GAIN * speed:
            number, speed = number + 1, tried
        for _ in range(PERIODS):
            speed = yield number
        if number > 1 and GAIN * (tried := (yield number - 1)) > speed:
            number, speed = number - 1, tried


def fetch(source: RemoteCheckpoint, wanted: Fetch, target: Path, partial: Path, turn: Turn) -> None:
    """Bring what is wanted to `target`, which appears complete and durable, or not at all; until then it is `partial`.

    KconvertError when the turn is `stopped` meanwhile.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # against another process that fills the same cache
            if target.exists():
                return
            for _ in range(ATTEMPTS):
                if _fill(source, wanted, file.fileno(), partial, turn):
                    os.fsync(file.fileno())
                    os.rename(partial, target)
                    return
                os.ftruncate(file.fileno(), 0)
    except OSError as error:
        raise explain_os_error(error, f"cannot write {target}") from None
    raise KconvertError(
        f"{wanted.file} of {source.name} arrived {ATTEMPTS} times with another content than the list of files describes; run "
        "the same command again later, what is done is kept"
    )


def _fill(source: RemoteCheckpoint, wanted: Fetch, descriptor: int, partial: Path, turn: Turn) -> bool:
    """Append what is missing; whether the whole is right, as far as that can be told."""
    have, digest = os.fstat(descriptor).st_size, source.digest(wanted.file)
    if wanted.is_whole:
        feed(digest.update, partial)
    with _Growing(partial, descriptor, digest, turn) as sink:
        for start, stop in _missing(wanted.extents, have):
            sink.seek(start)
            try:
                source.transfer(wanted.file, start, stop, sink, turn.stopped)
            finally:
                sink.flush()
    return not wanted.is_whole or digest.agrees()


class _Growing:
    """A sink whose bytes go on into a file in pieces, past the page cache, and through a digest; a context manager.

    `descriptor` is of the file through the page cache.
    """

    def __init__(self, path: Path, descriptor: int, digest: Digest, turn: Turn) -> None:
        self._path, self._digest, self._turn = path, digest, turn
        self._descriptors = descriptor, open_direct(path, os.O_WRONLY)
        self._piece = memoryview(allocate(PIECE))  # from its byte `begin` to `end` is what has come

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptors[1])

    def seek(self, position: int) -> None:
        """The next bytes belong there; all before are in the file."""
        self._position = position
        self._begin = self._end = position % PAGE
        self._flushed = time.monotonic()

    def room(self) -> memoryview:
        self._turn.begin()
        if self._turn.stopped.is_set():
            raise KconvertError(f"the download of {self._path.name} was stopped")
        return self._piece[self._end :]

    def took(self, count: int) -> None:
        self._end += count
        self._turn.line.received(count)
        if self._end == PIECE or time.monotonic() - self._flushed > LONGEST_HELD:
            self.flush()

    def flush(self) -> None:
        """Have what has come in the file."""
        self._turn.end()
        data = self._piece[self._begin : self._end]
        try:
            write_past_cache(*self._descriptors, data, self._position)
        except OSError as error:
            raise explain_os_error(error, f"cannot write {self._path}") from None
        self._digest.update(data)
        self.seek(self._position + len(data))


def _missing(extents: Sequence[Extent], have: int) -> list[Extent]:
    """What of the extents lies beyond the first `have` bytes of the file."""
    return [(max(start, have), stop) for start, stop in extents if stop > have]


def feed(take: Callable[[bytes], object], path: Path) -> None:
    """Hand a file's bytes to `take`."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            take(chunk)
