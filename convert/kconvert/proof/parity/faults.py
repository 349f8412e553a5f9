"""What of a weight's rows is not what belongs there, said of the first element that is not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kconvert.models.model import Weight
from kconvert.proof.parity.metrics import same_bits
from kconvert.proof.parity.rows import Rows
from kconvert.proof.parity.witnesses.registry import witness_of

if TYPE_CHECKING:
    from kconvert.proof.parity.witnesses.base import State


def fault_of(rows: Rows, judge: str) -> str | None:
    """The first of the rows' elements or bytes that is not the one that belongs there, where it is known which does.

    `judge` is what Standard.judge says. What gives back every value needs no other bytes, whichever they are.
    """
    if judge == "bytes" and is_certain(rows):
        return None
    renamed = rows.ours.format.label == rows.theirs.format.label
    if judge == "values" or (judge == "bytes" and (renamed or witness_of(rows.theirs.format).has_many_spellings)):
        if _values_right(rows):
            return None
        if judge == "values":
            return _value_fault(rows)
    return _byte_fault(rows) if judge == "bytes" else None


def is_certain(rows: Rows) -> bool:
    """Whether the codes are right by what has been seen of such weights, so that nothing of the output need be decoded."""
    if rows.surely_copied:
        return True
    return rows.quickly and rows.kind in rows.desk.known and _quickly_right(rows)


def _values_right(rows: Rows) -> bool:
    """Whether all values are the source's, but for signs that get lost and scales that the encoding has not, as planned."""
    if rows.surely_copied:
        return True
    right = rows.same or same_bits(rows.expected.to(rows.found.dtype), rows.found) or lost_signs(rows)
    right = right or (rows.planned is not None and same_bits(rows.planned, rows.found))
    if rows.copied and right:
        rows.desk.copied.add(rows.kind)
    return right


def lost_signs(rows: Rows) -> bool:
    """Whether what differs is the sign of zeros, and the output's encoding has none."""
    if not witness_of(rows.theirs.format).loses_signs or rows.same or rows.surely_copied:
        return False
    found, expected = rows.found, rows.expected.to(rows.found.dtype)
    return not same_bits(expected, found) and same_bits(expected + 0, found + 0)


def _value_fault(rows: Rows) -> str:
    """Names the first element whose bits are not those expected."""
    import torch

    found, wanted = rows.found, (rows.expected if rows.planned is None else rows.planned).to(rows.found.dtype)
    bits = torch.int16 if found.element_size() == 2 else torch.int32
    row, col = (int(i) for i in (wanted.view(bits) != found.view(bits)).nonzero()[0])
    where = f"tensor {rows.theirs.tensors[0].name!r} differs at [{rows.first + row}, {col}]"
    has = "compressed-tensors" if witness_of(rows.ours.format).by_library else "the source"
    has += " with the nearest scales of F16" * (rows.planned is not None)
    rounded = rows.theirs.format.quantised and rows.ours.format.label != rows.theirs.format.label
    advice = "; if its codes or scales were rounded, judge it with --close" if rounded else ""
    return f"{where}: it is {float(found[row, col])!r}, {has} gives {float(wanted[row, col])!r}{advice}"


def _byte_fault(rows: Rows) -> str | None:
    """Where the tensors found are none of those that kconvert may make of the values, and do not give them back either.

    The quick way is believed once the reference has said the same of some rows of such a weight. Of several candidates of the
    reference the nearest was meant.
    """
    known = rows.desk.known  # of these is_certain has judged before
    if rows.quickly and rows.kind not in known and _quickly_right(rows) and _is_a_candidate(rows.asked()):
        known.add(rows.kind)
        return None
    differences = []
    for candidate in _candidates(rows):
        count, fault = _difference(rows.theirs, candidate, rows.output, rows.first)
        if not count:
            return None
        differences.append((count, fault))
    if same_bits(rows.expected.to(rows.found.dtype), rows.found):
        return None
    return f"{min(differences)[1]}; if something else than kconvert made this checkpoint, judge it with --close"


def _is_a_candidate(rows: Rows) -> bool:
    """Whether the reference may make these very tensors."""
    return any(not _difference(rows.theirs, one, rows.output, rows.first)[0] for one in _candidates(rows))


def _candidates(rows: Rows) -> Iterator[State]:
    witness = witness_of(rows.theirs.format)
    if (kept := witness.respelt(rows.ours.format, rows.source)) is not None:
        yield kept
    else:
        yield from witness.encodings(rows.expected, rows.theirs, rows.first, rows.output)


def _quickly_right(rows: Rows) -> bool:
    """Whether the tensors found are those that the format makes of the values, as far as the quick way knows."""
    import torch

    witness = witness_of(rows.theirs.format)
    if not witness.judges_quickly or not rows.moderate or not rows.ours.cols:
        return False
    values = rows.expected
    return (
        values.dtype == torch.bfloat16
        and values.is_contiguous()
        and witness.is_made_of(values, rows.theirs, rows.first, rows.output, rows.desk.theirs)
    )


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
