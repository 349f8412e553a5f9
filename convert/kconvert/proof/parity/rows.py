"""The same rows of a weight in two checkpoints, decoded by the oracle or by the quick way that it has approved of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.source import Reader
from kconvert.formats import Format
from kconvert.models.model import Weight
from kconvert.proof.parity.metrics import below, same_bits
from kconvert.proof.parity.oracle import decoded, is_quick, quick_values, read_state, row_unit
from kconvert.proof.parity.witnesses.registry import witness_of

if TYPE_CHECKING:
    import torch

    from kconvert.proof.parity.witnesses.base import State

HEAD = 4  # rows
PIECE_ELEMENTS = 1 << 19  # that are decoded at a time: what a process has in memory is a few times as much
ASKED_ELEMENTS = 1 << 16  # of which the reference, which takes a hundred times as long, has the word
Kind: TypeAlias = tuple[Format, Format, int]  # of both sides, and the columns


class Desk:
    """A process's memory for the two sides, rooms into which these are read by turns, and the kinds of weights of which the
    quick way has been seen to decode the output, to know the bytes, and to know codes that were copied."""

    def __init__(self) -> None:
        self.ours, self.theirs = Buffers(), Buffers()
        self.rooms = (Buffers(), Buffers()), (Buffers(), Buffers())
        self.decoded: set[Kind] = set()
        self.known: set[Kind] = set()
        self.copied: set[Kind] = set()


@dataclass(frozen=True)
class Rows:
    """The same rows of a weight on both sides, from `first` on: the tensors that spell them, decoded when asked for."""

    ours: Weight
    theirs: Weight
    source: State
    output: State
    first: int
    last: int
    desk: Desk
    quickly: bool = True

    @property
    def kind(self) -> Kind:
        return self.ours.format, self.theirs.format, self.ours.cols

    def head(self) -> Rows:
        """The first HEAD rows, or as many more as cannot be decoded without each other."""
        return self._start(math.lcm(*(_head(weight) for weight in (self.ours, self.theirs))))

    def asked(self) -> Rows:
        """The first rows, ASKED_ELEMENTS or as many more as cannot be encoded without each other."""
        return self._start(self._whole(ASKED_ELEMENTS))

    def _start(self, rows: int) -> Rows:
        return self._cut(self.first, min(self.first + rows, self.last))

    def pieces(self) -> Iterator[Rows]:
        """All of them, PIECE_ELEMENTS at a time or as many more as cannot be encoded without each other."""
        count = self._whole(PIECE_ELEMENTS)
        for first in range(self.first, self.last, count):
            yield self._cut(first, min(first + count, self.last))

    def _whole(self, elements: int) -> int:
        """How many rows are so many elements, or one unit that can be decoded and encoded by itself."""
        unit = math.lcm(row_unit(self.ours), row_unit(self.theirs))
        return max(1, elements // max(self.ours.cols, 1) // unit) * unit

    def _cut(self, first: int, last: int) -> Rows:
        sides = (self.ours, self.source), (self.theirs, self.output)
        source, output = (_cut(weight, state, self.first, first, last) for weight, state in sides)
        return replace(self, source=source, output=output, first=first, last=last)

    @cached_property
    def same(self) -> bool:
        """Whether both sides have the same bytes."""
        return self.ours.format == self.theirs.format and all(
            same_bits(self.source[suffix], tensor) for suffix, tensor in self.output.items()
        )

    @cached_property
    def copied(self) -> bool:
        """Whether the output has the source's codes and steps, and so its values."""
        return self.quickly and witness_of(self.theirs.format).copies(self.output, self.ours.format, self.source)

    @property
    def surely_copied(self) -> bool:
        """The same, which is believed once values of such a weight have been seen to be the same, see Desk."""
        return self.kind in self.desk.copied and self.copied

    @cached_property
    def expected(self) -> torch.Tensor:
        if witness_of(self.theirs.format).keeps_products:
            witness, cols = witness_of(self.ours.format), self.ours.cols
            if self.quickly and is_quick(self.ours):
                return witness.quick_products(self.source, cols, self.desk.ours)
            return witness.products(self.source, (self.last - self.first, cols))
        return self._values(self.ours, self.source, self.desk.ours)

    @cached_property
    def planned(self) -> torch.Tensor | None:
        """What is expected where the output's encoding has not all of the source's scales; None where it has."""
        nearest = witness_of(self.theirs.format).nearest(self.ours.format, self.source)
        if nearest is None:
            return None
        return witness_of(self.ours.format).products(nearest, (self.last - self.first, self.ours.cols))

    @cached_property
    def changed(self) -> int:
        """How many groups have other values than the source's, as planned."""
        shape = self.last - self.first, self.ours.cols
        return witness_of(self.theirs.format).count_changed(self.ours.format, self.source, shape)

    @cached_property
    def found(self) -> torch.Tensor:
        return self.expected if self.same else self._values(self.theirs, self.output, self.desk.theirs)

    @cached_property
    def moderate(self) -> bool:
        """Whether all values of the source are finite, and so far from the largest that no encoding of them can be infinite."""
        if is_quick(self.ours) and (step := witness_of(self.ours.format).largest_step(self.source)) is not None:
            return below(step, 2.0**-6)
        return below(self.expected, 2.0**-2)

    def _values(self, weight: Weight, state: State, buffers: Buffers) -> torch.Tensor:
        rows = self.last - self.first
        if self.quickly:
            return quick_values(weight, state, rows, buffers)
        return decoded(weight.format, state, (rows, weight.cols))


def approved(ours: Weight, theirs: Weight, source: Reader, output: Reader, desk: Desk) -> bool:
    """Whether the quick way has the oracle's values of the first rows: of every source, and of the first output of a kind."""
    kind = ours.format, theirs.format, ours.cols
    if not _is_approved(ours, source, desk.ours):
        return False
    if kind not in desk.decoded:
        if not _is_approved(theirs, output, desk.theirs):
            return False
        desk.decoded.add(kind)
    return True


def _is_approved(weight: Weight, reader: Reader, buffers: Buffers) -> bool:
    if not is_quick(weight) or not (rows := min(_head(weight), weight.rows)) or not weight.cols:
        return True
    state = read_state(weight, reader, 0, rows, buffers)
    return same_bits(quick_values(weight, state, rows, buffers), decoded(weight.format, state, (rows, weight.cols)))


def _head(weight: Weight) -> int:
    """How many rows are looked at first: HEAD, or as many more as cannot be decoded without each other."""
    unit = 1 if witness_of(weight.format).decodes_parts_of_blocks else row_unit(weight)
    return math.ceil(HEAD / unit) * unit


def _cut(weight: Weight, state: State, begin: int, first: int, last: int) -> State:
    """What `state`, which begins with row `begin`, has of rows `first` to `last`."""
    cut = dict(state)
    for part in weight.parts:
        tensor = state.get(part.suffix)
        if tensor is None or not tensor.nbytes:
            continue
        if part.across:
            start, stop = (
                place - part.columns(weight.rows, begin, begin)[0] for place in part.columns(weight.rows, first, last)
            )
            cut[part.suffix] = tensor[:, start:stop]
        elif part.every is not None:
            begun, _ = part.span(weight.rows, begin, begin)
            start, stop = (
                (place - begun) * len(tensor) // tensor.nbytes for place in part.span(weight.rows, first, last)
            )
            cut[part.suffix] = tensor[start:stop]
    return cut
