"""Locks by which runs on one DST know of each other; they end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kconvert.errors import KconvertError

LOCK = "lock"
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(KconvertError):
    """Another run is at work; later it may not be."""


@contextmanager
def hold(path: Path, busy: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the file `path`, alone or with others who share it.

    Where another holds it, wait or raise Busy with what `busy` says. An OSError is left to the caller.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(held, path, busy, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(held)


def _lock(held: int, path: Path, busy: str, mode: int) -> None:
    try:
        fcntl.flock(held, mode)
    except BlockingIOError:
        raise Busy(busy) from None
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        raise KconvertError(
            f"the file system of {path} has no locks (flock), by which runs know of each other; mount it with them, or choose "
            "another directory"
        ) from None
