"""Memory that a thread keeps from task to task: fresh memory costs more than most arithmetic on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kconvert.checkpoint.files import PAGE, allocate

if TYPE_CHECKING:
    import mmap

    from kconvert.formats.base import Bytes


class Fetcher(Protocol):
    """Where bytes come from; see checkpoint.source.Reader."""

    def fetch(self, file: str, start: int, nbytes: int, room: memoryview) -> memoryview: ...


class Buffers:
    """One thread's: page-aligned, grown when a task needs more. What was taken for a use is lost when it is taken again."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self._held: dict[str, tuple[tuple[str, int, int], Bytes]] = {}

    def take(self, use: str, nbytes: int, alignment: int = 0) -> Bytes:
        """`nbytes` bytes for `use`, whose address is `alignment` modulo PAGE."""
        import numpy as np

        held = self._maps.get(use)
        if held is None or len(held) < nbytes + PAGE:
            held = self._maps[use] = allocate(nbytes + PAGE)
        return np.frombuffer(held, np.uint8, nbytes, alignment % PAGE)

    def fetch(self, source: Fetcher, use: str, file: str, start: int, nbytes: int) -> Bytes:
        """Bytes of `file`, in the buffer for `use`."""
        import numpy as np

        if not nbytes:
            return np.empty(0, np.uint8)
        room = self.take(use, nbytes + 2 * PAGE)
        return np.frombuffer(source.fetch(file, start, nbytes, room.data), np.uint8)

    def hold(self, source: Fetcher, use: str, file: str, start: int, nbytes: int) -> Bytes:
        """`fetch`, but what is held for this use already is not read again; it is for nothing else, and of one source."""
        place = (file, start, nbytes)
        if self._held.get(use, (None,))[0] != place:
            self._held[use] = place, self.fetch(source, use, file, start, nbytes)
        return self._held[use][1]
