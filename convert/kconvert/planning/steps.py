"""What a plan is made of: a weight goes from one format to another, or a tensor keeps its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from kconvert.checkpoint.safetensors import Described, Tensor
from kconvert.formats import Format, Part, parts_of
from kconvert.formats.base import FATES, tensor_name
from kconvert.formats.dtypes import tensor_bytes


class Place(NamedTuple):
    """Where a tensor's bytes begin: `start` counts from the beginning of `file`."""

    file: str
    start: int


Origin: TypeAlias = Tensor | Place  # a tensor of the source, or where its bytes begin


@dataclass(frozen=True, slots=True)
class Slot:
    """Which matrix of a stack [experts, rows, cols] a weight becomes: number `index` of `count`, `width` of them an expert's,
    one above the other. The stack's tensors are called by `stack` as a weight's, or, if it is `bare`, by that name alone."""

    stack: str
    index: int
    count: int
    width: int
    bare: bool

    def whole(self, part: Part) -> Described:
        """The tensor in which the matrices' `part`s lie."""
        if part.every is None and part.shape == (1,):  # a number for each matrix
            return part.tensor_of(self.stack), part.dtype, (self.count,)
        rows, *rest = part.shape
        name = self.stack if self.bare else part.tensor_of(self.stack)
        return name, part.dtype, (self.count // self.width, self.width * rows, *rest)


class Mate(NamedTuple):
    """A weight [rows, cols] as the source spells it."""

    name: str
    rows: int
    cols: int
    source: Format
    reads: tuple[Origin, ...]


class Transcode(NamedTuple):
    """A weight [rows, cols] goes from one format to another; a place for each part, in the order of `format.parts`.

    `output` is its name there where that is another one than in the source, `slot` its place in a stack. `mates` are those
    whose values decide together what the target settles, see Format.settle: the weight and those that engines fuse with it, one
    tuple for all of them; none where it settles nothing.
    """

    name: str
    rows: int
    cols: int
    source: Format
    reads: tuple[Origin, ...]
    target: Format
    writes: tuple[Place, ...] = ()
    output: str = ""
    slot: Slot | None = None
    mates: tuple[Mate, ...] = ()

    @property
    def title(self) -> str:
        """What a message calls it: the weight, and the file of the source in which it begins."""
        weight = f"weight {self.name!r}"
        return f"{self.reads[0].file}: {weight}" if self.reads else weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def source_parts(self) -> tuple[Part, ...]:
        return parts_of(self.source, self.rows, self.cols)

    @property
    def target_parts(self) -> tuple[Part, ...]:
        return parts_of(self.target, self.rows, self.cols)

    @property
    def outputs(self) -> list[Described]:
        """What it writes, or of a slot what it writes a part of."""
        if self.slot is not None:
            return [self.slot.whole(part) for part in self.target_parts]
        name = self.output or self.name
        return [(tensor_name(name, part.suffix), part.dtype, part.shape) for part in self.target_parts]

    def placed(self, writes: tuple[Place, ...]) -> Transcode:
        """In half the time of `_replace`, as a large model has a quarter of a million."""
        return Transcode(*self[:6], writes, *self[7:])

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where what it reads begins, its mates' as well."""
        return sum((mate.reads for mate in self.mates), ()) or self.reads

    @property
    def needs(self) -> Iterator[tuple[Origin, int]]:
        """`origins`, and how many bytes are read there."""
        own = Mate(self.name, self.rows, self.cols, self.source, self.reads)
        for mate in self.mates or (own,):
            for part, place in zip(parts_of(mate.source, mate.rows, mate.cols), mate.reads, strict=True):
                yield place, part.nbytes


class Copy(NamedTuple):
    """A tensor keeps its name, dtype, shape and bytes; with a `slot` it is the matrix of a stack, which has another name.

    The integers of one with `below` must lie in [0, below).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    reads: tuple[Origin, ...]
    writes: tuple[Place, ...] = ()
    slot: Slot | None = None
    below: int | None = None

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    @property
    def source_parts(self) -> tuple[Part, ...]:
        """The tensor, as if it were the only part of a weight."""
        return (Part("", self.dtype, self.shape, below=self.below),)

    @property
    def origins(self) -> tuple[Origin, ...]:
        return self.reads

    @property
    def needs(self) -> Iterator[tuple[Origin, int]]:
        """`origins`, and how many bytes are read there."""
        yield from ((place, self.nbytes) for place in self.reads)

    @property
    def outputs(self) -> list[Described]:
        if self.slot is not None:
            return [self.slot.whole(Part(self.name.rpartition(".")[2], self.dtype, self.shape))]
        return [(self.name, self.dtype, self.shape)]

    def placed(self, writes: tuple[Place, ...]) -> Copy:
        return Copy(self.name, self.dtype, self.shape, self.reads, writes, self.slot, self.below)


Step: TypeAlias = Transcode | Copy


def copy_of(
    tensor: Tensor, shape: tuple[int, ...] | None = None, slot: Slot | None = None, below: int | None = None
) -> Copy:
    """The tensor as it is, or what of its beginning has this shape; without a place in the output."""
    return Copy(tensor.name, tensor.dtype, tensor.shape if shape is None else shape, (tensor,), (), slot, below)


def count_steps(steps: Sequence[Step]) -> dict[str, Any]:
    """How many steps of each kind there are, and which conversions lose something."""
    transcoded = [step for step in steps if isinstance(step, Transcode)]
    # By identity: formats are few, and to ask each step's for its fate and label takes longer than all else.
    counts = Counter((id(step.source), id(step.target)) for step in transcoded)
    fates: dict[str, Counter[str]] = {fate: Counter() for fate in FATES}
    for pair, step in {(id(step.source), id(step.target)): step for step in transcoded}.items():
        fates[step.target.fate(step.source)][f"{step.source.label} -> {step.target.label}"] += counts[pair]
    return {
        "transcoded": len(transcoded),
        "copied": len(steps) - len(transcoded),
        **{fate: dict(pairs) for fate, pairs in fates.items()},
    }
