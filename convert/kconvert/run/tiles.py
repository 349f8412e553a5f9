"""What a worker takes at a time of a step: tasks of about so many bytes, made of tiles that stay in a core's cache; how these
are read, and what all tasks of a weight share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np

from kconvert.checkpoint.buffers import Buffers, Fetcher
from kconvert.checkpoint.files import PAGE
from kconvert.formats import Part
from kconvert.formats.dense import Dense
from kconvert.planning.steps import Copy, Origin, Step, Transcode
from kconvert.run.values import check_part, may_overflow, naming

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Tile

TILE_BYTES = 2 << 20  # of f32: stays in the shared cache, and is work enough that threads seldom wait for the GIL
SMALL = 1 << 20  # bytes
COPIES = 4  # times a task is as large as what is copied at a time
INFINITE = np.float32(2.0**128 - 2.0**119)  # this and more is, rounded to BF16


class Shared:
    """The parts of a weight that each of its `tasks` needs whole, or that are too small to be read in pieces: the first reads
    them for all."""

    def __init__(self, tasks: int) -> None:
        self._left = tasks
        self._data: dict[int, Bytes] = {}
        self._lock = threading.Lock()

    @contextmanager
    def held(self, read: Callable[[], dict[int, Bytes]]) -> Iterator[dict[int, Bytes]]:
        """The parts by their places, while one task decodes; with the last task they are gone."""
        with self._lock:
            self._data = self._data or read()
        yield self._data
        with self._lock:
            self._left -= 1
            if not self._left:
                self._data.clear()


class Once:
    """A number that the first who asks works out, while others wait for it."""

    def __init__(self) -> None:
        self._value: float | None = None
        self._lock = threading.Lock()

    def get(self, work_out: Callable[[], float]) -> float:
        with self._lock:
            if self._value is None:
                self._value = work_out()
            return self._value


@dataclass(frozen=True, slots=True)
class Task:
    """Rows `first` to `last` (exclusive) of a transcoded weight, or bytes of a copied tensor.

    `reach` is that of the weight and of its mates, see Transcode.
    """

    step: Step
    first: int
    last: int
    shared: Shared
    reach: Once


def row_unit(step: Transcode) -> int:
    """Tiles begin at multiples of this many rows, so that no slice of a part is cut."""
    return lcm(*(part.every for part in (*step.source_parts, *step.target_parts) if part.every))


def tile_rows(step: Transcode) -> int:
    unit = row_unit(step)
    return max(unit, TILE_BYTES // (4 * max(step.cols, 1)) // unit * unit)


def task_size(step: Step, nbytes: int) -> int:
    """How many rows of a weight, or bytes of a copied tensor, make a task of up to about `nbytes`.

    All tasks of a weight are alike, so that none needs more memory than their number makes necessary. Copies are smaller: what
    they are read into is then no larger than the input of a task that has more output.
    """
    if isinstance(step, Copy):
        return max(nbytes // COPIES // PAGE, 1) * PAGE
    unit = row_unit(step)
    most = max(int(nbytes / max(row_bytes(step), 1)) // unit, 1)
    units = -(-step.rows // unit)
    return max(-(-units // max(-(-units // most), 1)), 1) * unit


def row_bytes(step: Transcode) -> float:
    return sum(part.nbytes for part in (*step.source_parts, *step.target_parts) if part.every) / max(step.rows, 1)


def cut(parts: tuple[Part, ...], data: list[Bytes], rows: int, base: int, first: int, last: int) -> list[Bytes]:
    """The bytes of each part that rows `first` to `last` need; `data` begin at row `base`."""
    cuts = []
    for part, bytes_ in zip(parts, data, strict=True):
        origin = part.span(rows, base, base)[0] if part.every else 0
        start, stop = part.span(rows, first, last)
        cuts.append(bytes_[start - origin : stop - origin])
    return cuts


def lies_across(part: Part) -> bool:
    """Whether rows of the weight have no bytes of the part for themselves."""
    return part.across


def is_shared(part: Part) -> bool:
    """Whether tasks have the part in common: they need the whole of it, or it takes longer to ask for than to read."""
    return lies_across(part) or part.nbytes <= SMALL


def wholes_of(step: Transcode, source: Fetcher, wanted: Callable[[Part], bool] = lies_across) -> dict[int, Bytes]:
    """All bytes of the parts that are wanted, by their places; in memory of their own."""
    return {
        index: _fetched(step, part, place, 0, part.nbytes, source, Buffers(), "whole")
        for index, (part, place) in enumerate(zip(step.source_parts, step.reads, strict=True))
        if wanted(part)
    }


def copied(step: Copy, first: int, last: int, source: Fetcher, buffers: Buffers) -> Bytes:
    """Bytes `first` to `last` of the tensor."""
    (part,), (place,) = step.source_parts, step.reads
    return _fetched(step, part, place, first, last, source, buffers, "in.0")


def _fetched(
    step: Step, part: Part, place: Origin, start: int, stop: int, source: Fetcher, buffers: Buffers, use: str
) -> Bytes:
    """Bytes `start` to `stop` of a part, whose values are sound."""
    data = buffers.fetch(source, use, place.file, place.start + start, stop - start)
    check_part(step, part, place, data, start)
    return data


def inputs_of(
    step: Transcode, first: int, last: int, wholes: Mapping[int, Bytes], source: Fetcher, buffers: Buffers
) -> list[Bytes]:
    """The bytes of every part that these rows need, of those that lie across all; parts of other rows take no buffer."""
    data: list[Bytes] = []
    for index, (part, place) in enumerate(zip(step.source_parts, step.reads, strict=True)):
        start, stop = part.span(step.rows, first, last)
        if index in wholes:
            data.append(wholes[index][start:stop])
            continue
        use = f"in.{sum(map(bool, map(len, data)))}"
        data.append(_fetched(step, part, place, start, stop, source, buffers, use))
    return data


def decoded(
    step: Transcode, inputs: list[Bytes], first: int, last: int, buffers: Buffers
) -> Iterator[tuple[int, int, Tile]]:
    """The values of rows `first` to `last` in tiles f32 [rows, cols]: the first row, the one after the last, and the tile.

    `inputs` are the bytes that spell them; a tile has the memory of the one before. A value that is not finite is an error.
    """
    count, huge = tile_rows(step), _may_overflow(step, inputs)
    floats = buffers.take("tile", 4 * min(count, last - first) * step.cols).view(np.float32)
    for row in range(first, last, count):
        stop = min(row + count, last)
        tile = floats[: (stop - row) * step.cols].reshape(stop - row, step.cols)
        with naming(f"{step.title} cannot be read as {step.source.label}", row, stop):
            step.source.decode(cut(step.source_parts, inputs, step.rows, first, row, stop), row, tile)
            if huge and (np.abs(tile) >= INFINITE).any():
                raise ValueError("it has a scale so large that a value is infinite")
        yield row, stop, tile


def goes_straight(step: Transcode, inputs: list[Bytes]) -> bool:
    """Whether values are decoded to where they are written, without a tile between: as plain bf16, none of them infinite."""
    plain = isinstance(step.target, Dense) and step.target.dtype == "BF16" and step.target.transposed is None
    return plain and step.source.decodes_bf16 and not _may_overflow(step, inputs)


def decode_straight(step: Transcode, inputs: list[Bytes], first: int, last: int, output: Bytes) -> None:
    """`decoded`, to the bytes of these rows in a plain tensor, all at once."""
    values: Any = output.view(np.uint16).reshape(last - first, step.cols)
    with naming(f"{step.title} cannot be read as {step.source.label}", first, last):
        step.source.decode(inputs, first, values)


def _may_overflow(step: Transcode, inputs: list[Bytes]) -> bool:
    return any(map(may_overflow, step.source_parts, inputs))


def reach_of(step: Transcode, source: Fetcher, buffers: Buffers, task_bytes: int) -> float:
    """The largest magnitude of the weight's values, or what its scales say that none is above."""
    count = task_size(step, task_bytes)
    starts = range(0, step.rows, count)

    def read(*wanted: int) -> Iterator[list[Bytes]]:
        for first in starts:
            places = [(step.source_parts[index], step.reads[index]) for index in wanted]
            spans = [part.span(step.rows, first, min(first + count, step.rows)) for part, _ in places]
            yield [
                _fetched(step, part, place, start, stop, source, buffers, f"in.{k}")
                for k, ((part, place), (start, stop)) in enumerate(zip(places, spans, strict=True))
            ]

    reach = step.source.reach(read)
    if reach is not None:
        return reach
    wholes = wholes_of(step, source)
    return max(
        (_largest(step, first, min(first + count, step.rows), wholes, source, buffers) for first in starts), default=0
    )


def _largest(
    step: Transcode, first: int, last: int, wholes: Mapping[int, Bytes], source: Fetcher, buffers: Buffers
) -> float:
    """The largest magnitude of the values in these rows."""
    inputs, largest = inputs_of(step, first, last, wholes, source, buffers), 0.0
    for _, _, tile in decoded(step, inputs, first, last, buffers):
        largest = max(largest, float(tile.max(initial=0)), -float(tile.min(initial=0)))
    return largest
