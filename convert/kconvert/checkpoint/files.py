"""System calls on files: positional and whole, past the page cache where the filesystem can.

O_DIRECT needs offsets, lengths and addresses in whole pages. Where a filesystem does not know it, or refuses a call, the
descriptor quietly goes on through the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

from kconvert.errors import KconvertError, explain_os_error

PAGE = 4096
O_DIRECT = getattr(os, "O_DIRECT", 0)


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is at a path that a user gave; see `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything is at a path that a user gave.

    KconvertError where the system will not say (no permission, a name too long, links in a circle), and for a link that leads
    nowhere, in whose place nothing can be made either.
    """
    return _mode(path) is not None


def _mode(path: str | os.PathLike[str]) -> int | None:
    if "\0" in os.fspath(path):
        raise KconvertError(f"{os.fspath(path)!r} is no path, it has a NUL in it")
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise KconvertError(
                f"{path} is a symbolic link to {os.path.realpath(path)}, where nothing is; mend the link"
            ) from None
        return None
    except OSError as error:
        raise explain_os_error(error, f"cannot look at {path}") from None


def allocate(nbytes: int) -> mmap.mmap:
    """Memory that begins on a page, in huge pages where the kernel has them: the disk takes it in fewer, longer pieces."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def open_direct(path: Path, flags: int) -> int:
    """A descriptor of `path` that bypasses the page cache if it can."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC)


def read_at(descriptor: int, buffer: memoryview, offset: int, needed: int) -> int:
    """Read from `offset` until at least `needed` bytes are in `buffer` or the file ends; returns how many there are."""
    done, refused = 0, False
    while done < needed:
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            refused = _leave_direct(descriptor, error, refused)
            continue
        if count == 0:
            break
        done += count
    return done


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    done, refused = 0, False
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            refused = _leave_direct(descriptor, error, refused)


def write_past_cache(cached: int, direct: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, to which its address is equal modulo PAGE: whole pages by the descriptor `direct`, the
    ragged ends, less than a page each, by `cached`."""
    head = min(-offset % PAGE, len(data))
    tail = head + (len(data) - head) // PAGE * PAGE
    write_at(cached, data[:head], offset)
    write_at(direct, data[head:tail], offset + head)
    write_at(cached, data[tail:], offset + tail)


def _leave_direct(descriptor: int, error: OSError, refused: bool) -> bool:
    """Make the descriptor go through the page cache from now on; another thread may have done so in the meantime."""
    if error.errno != errno.EINVAL or refused:
        raise error
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~O_DIRECT)
    return True


def reserve(descriptor: int, nbytes: int) -> None:
    """Take the disk space now: a full disk shows before the work, and parallel writes need not extend the file."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, nbytes)


def sync_directory(path: Path) -> None:
    """Make renames in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, partial: Path, data: bytes) -> None:
    """A small file, whole or not at all; `partial` is its name until then. An OSError becomes a KconvertError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
        sync_directory(path.parent)
    except OSError as error:
        raise explain_os_error(error, f"cannot write {path}") from None
