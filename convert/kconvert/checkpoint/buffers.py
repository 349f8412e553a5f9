"""Memory that a thread keeps from task to task: fresh memory costs more than most arithmetic on it, and so does memory of
another node."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kconvert.checkpoint.files import PAGE, allocate

if TYPE_CHECKING:
    import mmap

    from kconvert.formats.base import Bytes


NODES = Path("/sys/devices/system/node")


def stay_on_a_node(worker: int) -> None:
    """Keep this thread, and with it the memory that it is the first to touch, on one of the machine's nodes, if there are
    several; workers take them by turns."""
    with suppress(OSError, ValueError):  # no Linux, or one that does not say
        allowed = os.sched_getaffinity(0)
        lists = sorted(NODES.glob("node[0-9]*/cpulist"))
        nodes = [cpus for path in lists if (cpus := _numbers(path.read_text()) & allowed)]
        if len(nodes) > 1:
            os.sched_setaffinity(0, nodes[worker % len(nodes)])


def _numbers(ranges: str) -> set[int]:
    """`0-3,8` as Linux writes it."""
    numbers: set[int] = set()
    for piece in filter(None, ranges.strip().split(",")):
        first, _, last = piece.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


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
