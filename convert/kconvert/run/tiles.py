"""How much of a step is done at a time: tasks of about so many bytes, made of tiles that stay in a core's cache."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

from kconvert.checkpoint.files import PAGE
from kconvert.formats import Part
from kconvert.planning.steps import Copy, Step, Transcode

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes

TILE_BYTES = 2 << 20  # of f32: stays in the shared cache, and is work enough that threads seldom wait for the GIL


def row_unit(step: Transcode) -> int:
    """Tiles begin at multiples of this many rows, so that no slice of a part is cut."""
    return lcm(*(part.every for part in (*step.source_parts, *step.target_parts) if part.every))


def tile_rows(step: Transcode) -> int:
    unit = row_unit(step)
    return max(unit, TILE_BYTES // (4 * max(step.cols, 1)) // unit * unit)


def task_size(step: Step, nbytes: int) -> tuple[int, int]:
    """How much of the step makes a task of about `nbytes`, and the unit that it is a multiple of."""
    if isinstance(step, Copy):
        return nbytes // 2, PAGE  # once as read, and again as written where that is in another place of its page
    return int(nbytes / max(row_bytes(step), 1)), row_unit(step)


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
