"""One output shard: header first, positional writes from any thread, then fsync, rename and fsync of the directory.

Big writes bypass the page cache, which is several times faster and leaves the machine's memory alone. The caller's buffer
must be aligned like the place it goes to (address and offset equal modulo PAGE); the ragged ends, less than a page each,
take the page cache.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from kconvert.checkpoint.files import open_direct, reserve, sync_directory, write_at, write_past_cache
from kconvert.errors import explain_os_error


class ShardWriter:
    """Writes `path` under the name `partial` until every one of its `nbytes` bytes has come, but `padding` that is zero."""

    def __init__(self, path: Path, partial: Path, header: bytes, nbytes: int, padding: int = 0) -> None:
        self.path = path
        self._partial = partial
        self._lock = threading.Lock()
        self._remaining = nbytes - len(header) - padding
        self._descriptors: list[int] = []  # through the page cache, and past it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptors.append(os.open(partial, flags, 0o666))
            reserve(self._descriptors[0], nbytes)
            write_at(self._descriptors[0], memoryview(header), 0)
            self._descriptors.append(open_direct(partial, os.O_WRONLY))
        except OSError as error:
            self.abandon()
            raise explain_os_error(error, f"cannot write {path}") from None

    def write(self, data: memoryview, offset: int) -> bool:
        """Write `data` at `offset`; True when the shard is complete with it. Each byte must come exactly once."""
        cached, direct = self._descriptors
        try:
            write_past_cache(cached, direct, data, offset)
        except OSError as error:
            raise explain_os_error(error, f"cannot write {self.path}") from None
        with self._lock:
            self._remaining -= len(data)
            return self._remaining == 0

    def commit(self) -> None:
        """Make the complete shard durable and give it its name."""
        try:
            os.fsync(self._descriptors[0])
            self._close()
            os.rename(self._partial, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise explain_os_error(error, f"cannot finish {self.path}") from None

    def abandon(self) -> None:
        """Remove the unfinished file and give its space back, as far as the disk still lets us."""
        with suppress(OSError):
            self._close()
            self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
