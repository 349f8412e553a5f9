"""Files that are elsewhere to the disk: whole ones checked against their digest, of others the byte ranges that are wanted.

A file grows from its beginning, ranges in ascending order with holes between them, so its length says what is there; a
process that is killed leaves a file that the next one goes on with.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kconvert.checkpoint.listing import FileStat
from kconvert.checkpoint.remote import RemoteCheckpoint
from kconvert.errors import KconvertError, explain_os_error

ATTEMPTS = 3  # at a file whose digest is wrong
CHUNK = 1 << 20

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


def fetch(source: RemoteCheckpoint, wanted: Fetch, target: Path, partial: Path, stopped: threading.Event) -> None:
    """Bring what is wanted to `target`, which appears complete and durable, or not at all; until then it is `partial`.

    KconvertError when `stopped` is set meanwhile.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # against another process that fills the same cache
            if target.exists():
                return
            for _ in range(ATTEMPTS):
                if _fill(source, wanted, file.fileno(), partial, stopped):
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


def _fill(source: RemoteCheckpoint, wanted: Fetch, descriptor: int, partial: Path, stopped: threading.Event) -> bool:
    """Append what is missing; whether the whole is right, as far as that can be told."""
    have = os.fstat(descriptor).st_size
    digest = source.digest(wanted.file)
    if wanted.is_whole:
        feed(digest.update, partial)

    def take(chunk: bytes) -> None:
        nonlocal have
        if stopped.is_set():
            raise KconvertError(f"the download of {wanted.file} was stopped")
        view = memoryview(chunk)
        while view:
            count = os.pwrite(descriptor, view, have)
            have, view = have + count, view[count:]
        digest.update(chunk)

    for start, stop in _missing(wanted.extents, have):
        have = start
        source.transfer(wanted.file, start, stop, take, stopped)
    return not wanted.is_whole or digest.agrees()


def feed(take: Callable[[bytes], object], path: Path) -> None:
    """Hand a file's bytes to `take`."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            take(chunk)


def _missing(extents: Sequence[Extent], have: int) -> list[Extent]:
    """What of the extents lies beyond the first `have` bytes of the file."""
    return [(max(start, have), stop) for start, stop in extents if stop > have]
