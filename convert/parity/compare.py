"""One weight of two checkpoints, compared: what it should be, how far it is from that, and what it uses of its grid.

Both sides are decoded by compressed-tensors, torch or a reference, see oracle, never by the kernels that wrote the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from kconvert.checkpoint.source import Reader
from kconvert.formats.dense import Dense
from kconvert.model import Plain, Weight
from kconvert.parity.codes import GridUse, count_zero_groups, grid_use, group_columns, spread_of
from kconvert.parity.metrics import Errors, Limits, Position, Spread, measure, same_bits
from kconvert.parity.oracle import (
    authority,
    decoded,
    expected_parts,
    has_reference,
    independent_values,
    read_state,
    row_unit,
)

if TYPE_CHECKING:
    import torch

    from kconvert.parity.oracle import State

CHUNK_ELEMENTS = 1 << 20  # at a time; a worker takes some 50 MB for them, and more is slower
Advance: TypeAlias = Callable[[int], None]

# What a weight may lose of the values that it was made of, by the first word of its format: SQNR a few dB under what scales by
# amax make of Gaussian weights, and the largest rounding of the grid, with room for scales that clip to lower the squared
# error. AMX has one scale for a whole row: amax costs its other values more, and the best scale clips more (15.7 dB and 0.46
# for Gaussian rows of 7168 in four bits). A format that is not here has the limits of int4.
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

    `judged_by` is what Standard.judge says, `use` is None of a format without codes, `fault` a sentence or None.
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


def compare_weights(
    ours: Weight, theirs: Weight, source: Reader, output: Reader, standard: Standard, advance: Advance
) -> tuple[Comparison, Spread]:
    """Every row of the two, a chunk at a time; the first fault, and what was measured all the same."""
    judge = standard.judge(ours, theirs)
    fault = _constant_fault(theirs, output)
    errors, spread, zero_groups, equal = Errors(), Spread(), 0, True
    unit = math.lcm(row_unit(ours), row_unit(theirs))
    count = max(unit, CHUNK_ELEMENTS // max(ours.cols, 1) // unit * unit)
    for first in range(0, ours.rows, count):
        last = min(first + count, ours.rows)
        expected = independent_values(ours, source, first, last)
        state = read_state(theirs, output, first, last)
        found = decoded(theirs.format, state, (last - first, theirs.cols))
        same = same_bits(expected.to(found.dtype), found)
        if fault is None and judge == "values" and not same:
            fault = _value_fault(theirs, authority(ours.format), expected, found, first)
        if fault is None and judge == "bytes":
            fault = _byte_fault(theirs, expected, state, first)
        measured, rows = measure(expected, found, first)
        equal, errors = equal and same, errors + measured
        spread += spread_of(theirs.format, state, (last - first, theirs.cols)) + Spread(rows=rows)
        if spread.codes:
            zero_groups += count_zero_groups(found, group_columns(theirs.format, theirs.cols))
        advance(sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    if fault is None and errors.nonfinite:
        fault = f"tensor {theirs.tensors[0].name!r} has a value that is not finite"
    missed = standard.limits_for(theirs.format.label).missed(errors) if judge == "limits" else None
    if fault is None and missed:
        fault = f"weight {theirs.name!r} ({theirs.format.label}): its {missed}{_at(errors.worst)}"
    use = grid_use(spread, zero_groups) if spread.codes else None
    return _comparison(ours, theirs, judge, equal, errors, use, fault), spread


def _comparison(
    ours: Weight, theirs: Weight, judge: str, equal: bool, errors: Errors, use: GridUse | None, fault: str | None
) -> Comparison:
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
        equal=equal,
        errors=errors,
        use=use,
        fault=fault,
    )


def _value_fault(weight: Weight, source: str, expected: torch.Tensor, found: torch.Tensor, first: int) -> str:
    """Names the first element whose bits are not those expected; `first` is the number of the first row."""
    import torch

    bits = torch.int16 if found.element_size() == 2 else torch.int32
    wanted = expected.to(found.dtype)
    row, col = (int(i) for i in (wanted.view(bits) != found.view(bits)).nonzero()[0])
    where = f"tensor {weight.tensors[0].name!r} differs at [{first + row}, {col}]"
    return f"{where}: it is {float(found[row, col])!r}, {source} gives {float(wanted[row, col])!r}"


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
    return f"{min(differences)[1]}; of a checkpoint that kconvert did not make, see --close"


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


def compare_plain(ours: Plain, theirs: Plain, source: Reader, output: Reader, advance: Advance) -> str | None:
    """Where the bytes of a tensor that is no Linear differ; None when they do not."""
    a, b = ours.tensor, theirs.tensor
    for start in range(0, a.nbytes, CHUNK_ELEMENTS):
        size = min(CHUNK_ELEMENTS, a.nbytes - start)
        one, two = source.read(a.file, a.start + start, size), output.read(b.file, b.start + start, size)
        if one != two:
            byte = start + next(i for i in range(size) if one[i] != two[i])
            element = byte * math.prod(a.shape) // a.nbytes
            return f"tensor {b.name!r} differs from the source's at element {element}"
        advance(size)
    return None
