"""One weight of two checkpoints, compared: what it should be, how far it is from that, and what it uses of its grid.

Both sides are decoded by compressed-tensors, torch or a reference, see oracle, never by the kernels that wrote the output.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from kconvert.buffers import Buffers
from kconvert.checkpoint.source import Reader
from kconvert.formats.dense import Dense
from kconvert.model import Plain, Weight
from kconvert.parity import quick
from kconvert.parity.codes import GridUse, count_zero_groups, grid_use, group_columns, spread_of
from kconvert.parity.metrics import Errors, Limits, Position, Spread, measure, same_bits
from kconvert.parity.oracle import authority, decoded, expected_parts, has_reference, read_state, row_unit

if TYPE_CHECKING:
    import torch

    from kconvert.parity.oracle import State

CHUNK_ELEMENTS = 1 << 20  # of a weight at a time
CHUNK_BYTES = 4 << 20  # of another tensor at a time
CHECKED_ROWS = 16  # of each weight, by compressed-tensors as well
Advance: TypeAlias = Callable[[int], None]

# What a weight may lose of the values that it was made of, by the first word of its format: SQNR a few dB under what scales by
# amax make of Gaussian weights, and the largest rounding of the grid, with room for scales that clip to lower the squared
# error. AMX has one scale for a whole row: amax costs its other values more, and the best scale clips more (15.7 dB and 0.46
# for Gaussian rows of 7168 in four bits). The tests hold real slices of Kimi-K2.6 and of a Qwen model against them. A format
# that is not here has the limits of int4.
DEFAULT_LIMITS = {
    "bf16": Limits({"sqnr": 45.0}, {"max_relative": 2.0**-7}),
    "f16": Limits({"sqnr": 45.0}, {"max_relative": 2.0**-7}),
    "f32": Limits({"sqnr": 45.0}, {"max_relative": 2.0**-7}),
    "int8": Limits({"sqnr": 32.0}, {"max_relative": 0.05}),
    "fp8": Limits({"sqnr": 27.0}, {"max_relative": 0.13}),
    "mxfp8": Limits({"sqnr": 27.0}, {"max_relative": 0.13}),
    "mxfp4": Limits({"sqnr": 14.0}, {"max_relative": 0.6}),
    "nvfp4": Limits({"sqnr": 15.0}, {"max_relative": 0.4}),
    "int4": Limits({"sqnr": 13.0}, {"max_relative": 0.4}),
    "amxint4": Limits({"sqnr": 10.0}, {"max_relative": 0.85}),
    "amxint8": Limits({"sqnr": 32.0}, {"max_relative": 0.1}),
}


@dataclass(frozen=True)
class Standard:
    """What a weight is held to. `exact`: to the very bytes that belong there, as far as it is known which; limits decide only
    where it is not. Else the limits decide: `limits`, and for the metrics that it leaves open those of the format."""

    exact: bool = True
    limits: Limits = field(default_factory=Limits)

    def limits_for(self, label: str) -> Limits:
        """What decides for weights in the format with this label."""
        return DEFAULT_LIMITS.get(label.split(maxsplit=1)[0], DEFAULT_LIMITS["int4"]) | self.limits

    def judge(self, ours: Weight, theirs: Weight) -> str:
        """What decides: "values" (equal bit for bit), "bytes" (those of the reference encoding) or "limits"."""
        if not self.exact:
            return "limits"
        if ours.format == theirs.format or isinstance(theirs.format, Dense):
            return "values"
        return "bytes" if has_reference(theirs.format) else "limits"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A weight of the output against the source's; `equal`: all values are the source's, bit for bit.

    `judged_by` is what Standard.judge says, `use` is None of a format without codes, `fault` a sentence or None. `equal`,
    `errors` and `use` are of the rows that were measured, which are all unless compare_weights was told otherwise.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    rows: int
    cols: int
    source_format: str
    output_format: str
    judged_by: str
    equal: bool
    errors: Errors
    use: GridUse | None
    fault: str | None


class Desk(threading.local):
    """Each thread's memory for the two sides."""

    def __init__(self) -> None:
        self.ours, self.theirs = Buffers(), Buffers()


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

    @cached_property
    def expected(self) -> torch.Tensor:
        return self._values(self.ours, self.source, self.desk.ours)

    @cached_property
    def found(self) -> torch.Tensor:
        if self.ours.format == self.theirs.format and all(
            same_bits(self.source[suffix], tensor) for suffix, tensor in self.output.items()
        ):
            return self.expected
        return self._values(self.theirs, self.output, self.desk.theirs)

    def _values(self, weight: Weight, state: State, buffers: Buffers) -> torch.Tensor:
        rows = self.last - self.first
        if self.quickly:
            return quick.values(weight, state, rows, buffers)
        return decoded(weight.format, state, (rows, weight.cols))


@dataclass
class _Figures:
    """What has been measured of a weight."""

    errors: Errors = field(default_factory=Errors)
    spread: Spread = field(default_factory=Spread)
    zero_groups: int = 0
    equal: bool = True

    def add(self, rows: Rows) -> None:
        format, cols = rows.theirs.format, rows.theirs.cols
        measured, by_sqnr = measure(rows.expected, rows.found, rows.first)
        self.errors += measured
        self.equal &= same_bits(rows.expected.to(rows.found.dtype), rows.found)
        self.spread += spread_of(format, rows.output, (rows.last - rows.first, cols)) + Spread(rows=by_sqnr)
        if self.spread.codes:
            self.zero_groups += count_zero_groups(rows.found, group_columns(format, cols))

    @property
    def use(self) -> GridUse | None:
        return grid_use(self.spread, self.zero_groups) if self.spread.codes else None


def compare_weights(
    ours: Weight,
    theirs: Weight,
    source: Reader,
    output: Reader,
    standard: Standard,
    advance: Advance,
    desk: Desk,
    thorough: bool,
) -> tuple[Comparison, Spread]:
    """Every row of the two, a chunk at a time; the first fault, and what was measured all the same.

    Figures are of all rows if `thorough` or held to limits, else of the first chunk, and of those that differ or may be
    infinite. What does not come out as expected is decoded again by compressed-tensors, which has the last word.
    """
    judge = standard.judge(ours, theirs)
    fault = _constant_fault(theirs, output)
    figures, quickly = _Figures(), True
    for chunk in _chunks(ours, theirs, source, output, desk):
        if chunk.first == 0:
            quickly = _agree(ours, chunk.source, desk.ours) and _agree(theirs, chunk.output, desk.theirs)
        rows = replace(chunk, quickly=quickly)
        different = _fault(rows, judge)
        if different and quickly:
            rows = replace(chunk, quickly=False)
            different = _fault(rows, judge)
        fault = fault or different
        if thorough or judge == "limits" or rows.first == 0 or different or not _moderate(rows.expected):
            figures.add(rows)
        advance(sum(tensor.nbytes for tensor in rows.output.values()))
    fault = fault or _figures_fault(theirs, figures.errors, standard if judge == "limits" else None)
    return _comparison(ours, theirs, judge, figures, fault), figures.spread


def _chunks(ours: Weight, theirs: Weight, source: Reader, output: Reader, desk: Desk) -> Iterator[Rows]:
    unit = math.lcm(row_unit(ours), row_unit(theirs))
    count = max(unit, CHUNK_ELEMENTS // max(ours.cols, 1) // unit * unit)
    for first in range(0, ours.rows if ours.cols else 0, count):
        last = min(first + count, ours.rows)
        states = read_state(ours, source, first, last, desk.ours), read_state(theirs, output, first, last, desk.theirs)
        yield Rows(ours, theirs, *states, first, last, desk)


def _agree(weight: Weight, state: State, buffers: Buffers) -> bool:
    """Whether the quick way gives what compressed-tensors does for the first rows that `state` spells."""
    if not quick.is_quick(weight):
        return True
    rows = min(CHECKED_ROWS, weight.rows)
    cuts = {part.suffix: math.ceil(rows / part.every) for part in weight.parts if part.every}
    few = {suffix: tensor[: cuts[suffix]] if suffix in cuts else tensor for suffix, tensor in state.items()}
    return same_bits(quick.values(weight, few, rows, buffers), decoded(weight.format, few, (rows, weight.cols)))


def _moderate(values: torch.Tensor) -> bool:
    """Whether all values are finite, and so far from the largest that no encoding of them can be infinite."""
    import numpy as np
    import torch

    kind, unsigned = (np.int16, np.uint16) if values.element_size() == 2 else (np.int32, np.uint32)
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32).numpy()
    # As integers floats have the order of their magnitudes; with the sign bit they are the largest unsigned ones.
    ends = np.array([bits.max(), bits.view(unsigned).max()]).astype(unsigned).view(kind)
    return bool((torch.from_numpy(ends).view(values.dtype).abs() < torch.finfo(values.dtype).max / 4).all())


def _fault(rows: Rows, judge: str) -> str | None:
    """The first of the rows' elements or bytes that is not the one that belongs there, where it is known which does."""
    if judge == "values" and not same_bits(rows.expected.to(rows.found.dtype), rows.found):
        return _value_fault(rows)
    if judge == "bytes":
        return _byte_fault(rows.theirs, rows.expected, rows.output, rows.first)
    return None


def _figures_fault(weight: Weight, errors: Errors, standard: Standard | None) -> str | None:
    """What is wrong with the values as a whole; they are held to the limits of `standard` if there is one."""
    if errors.nonfinite:
        return f"tensor {weight.tensors[0].name!r} has a value that is not finite"
    missed = standard.limits_for(weight.format.label).missed(errors) if standard else None
    return f"weight {weight.name!r} ({weight.format.label}): its {missed}{_at(errors.worst)}" if missed else None


def _comparison(ours: Weight, theirs: Weight, judge: str, figures: _Figures, fault: str | None) -> Comparison:
    return Comparison(
        name=theirs.name,
        role=ours.role,
        layer=ours.layer,
        expert=ours.expert,
        rows=ours.rows,
        cols=ours.cols,
        source_format=ours.format.label,
        output_format=theirs.format.label,
        judged_by=judge,
        equal=figures.equal,
        errors=figures.errors,
        use=figures.use,
        fault=fault,
    )


def _value_fault(rows: Rows) -> str:
    """Names the first element whose bits are not those expected."""
    import torch

    found, wanted = rows.found, rows.expected.to(rows.found.dtype)
    bits = torch.int16 if found.element_size() == 2 else torch.int32
    row, col = (int(i) for i in (wanted.view(bits) != found.view(bits)).nonzero()[0])
    where = f"tensor {rows.theirs.tensors[0].name!r} differs at [{rows.first + row}, {col}]"
    has = authority(rows.ours.format)
    return f"{where}: it is {float(found[row, col])!r}, {has} gives {float(wanted[row, col])!r}"


def _at(worst: Position | None) -> str:
    if worst is None:
        return ""
    return f"; furthest off at [{worst.row}, {worst.col}]: it is {worst.found!r}, expected is {worst.expected!r}"


def _constant_fault(weight: Weight, reader: Reader) -> str | None:
    for part, tensor in zip(weight.parts, weight.tensors, strict=True):
        if part.constant is not None and reader.read(tensor.file, tensor.start, tensor.nbytes) != part.constant:
            return f"tensor {tensor.name!r} does not say [{weight.rows}, {weight.cols}]"
    return None


def _byte_fault(weight: Weight, expected: torch.Tensor, state: State, first: int) -> str | None:
    """Where the tensors found for the rows from `first` on are none of those that kconvert may make of the values.

    Of several that it may make, the nearest was meant.
    """
    differences = []
    for candidate in expected_parts(expected, weight, first):
        count, fault = _difference(weight, candidate, state, first)
        if not count:
            return None
        differences.append((count, fault))
    return f"{min(differences)[1]}; if something else than kconvert made this checkpoint, judge it with --close"


def _difference(weight: Weight, expected: State, found: State, first: int) -> tuple[int, str]:
    """How many bytes differ, and where the first does."""
    import torch

    count, fault = 0, ""
    for part, tensor in zip(weight.parts, weight.tensors, strict=True):
        if part.constant is not None or same_bits(expected[part.suffix], found[part.suffix]):
            continue
        wanted, have = (side[part.suffix].contiguous().view(torch.uint8).flatten() for side in (expected, found))
        different = (wanted != have).nonzero()
        if len(different) and not fault:
            start, _ = part.span(weight.rows, first, first)
            element = (start + int(different[0])) * math.prod(part.shape) // part.nbytes
            fault = f"tensor {tensor.name!r} differs from the reference encoding at element {element}"
        count += len(different)
    return count, fault


def compare_plain(
    ours: Plain, theirs: Plain, source: Reader, output: Reader, advance: Advance, desk: Desk
) -> str | None:
    """Where the bytes of a tensor that is no Linear differ; None when they do not."""
    a, b = ours.tensor, theirs.tensor
    for start in range(0, a.nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, a.nbytes - start)
        one = desk.ours.fetch(source, "plain", a.file, a.start + start, size)
        two = desk.theirs.fetch(output, "plain", b.file, b.start + start, size)
        different = one != two
        if different.any():
            element = (start + int(different.argmax())) * math.prod(a.shape) // a.nbytes
            return f"tensor {b.name!r} differs from the source's at element {element}"
        advance(size)
    return None
