"""One weight of two checkpoints, compared: what it should be, how far it is from that, and what it uses of its grid.

Both sides are decoded by compressed-tensors, torch or a reference, see oracle, never by the kernels that wrote the output.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Reader
from kconvert.errors import counted
from kconvert.formats import Format
from kconvert.formats.nvfp4 import INPUTS, ONE, Nvfp4
from kconvert.models.model import Weight
from kconvert.models.sorting import Plain
from kconvert.proof.parity.codes import GridUse, Usage, grid_use, usage_of
from kconvert.proof.parity.faults import fault_of, lost_signs
from kconvert.proof.parity.metrics import Errors, Limits, Measured, Position, Spread, same_bits, same_bytes
from kconvert.proof.parity.oracle import read_state, row_unit
from kconvert.proof.parity.rows import Desk, Rows
from kconvert.proof.parity.witnesses.ggml import BY_HEAD, CHANGED
from kconvert.proof.parity.witnesses.registry import witness_of
from kconvert.proof.processes import one_ahead

CHUNK = 3 << 19  # bytes that are read at a time, of whichever side has more
F32 = struct.Struct("<f")

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
    "mlx": Limits({"sqnr": 13.0}, {"max_relative": 0.4}),
    "q8_0": Limits({"sqnr": 32.0}, {"max_relative": 0.05}),
    "q6_k": Limits({"sqnr": 28.0}, {"max_relative": 0.1}),
    "q3_k": Limits({"sqnr": 11.0}, {"max_relative": 0.5}),
    "q2_k": Limits({"sqnr": 6.0}, {"max_relative": 0.8}),
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
        kinds = (kind.split(maxsplit=1)[0] for kind in label.removesuffix(BY_HEAD).split(" and "))
        usual = min(
            (DEFAULT_LIMITS.get(kind, DEFAULT_LIMITS["int4"]) for kind in kinds), key=lambda found: found.floors["sqnr"]
        )
        if label.endswith(BY_HEAD):  # transposed, so that a row has values of many scales
            usual = Limits(usual.floors)
        return usual | self.limits

    def judge(self, ours: Weight, theirs: Weight) -> str:
        """What decides: "values" (equal bit for bit), "bytes" (those of the reference encoding) or "limits"."""
        if not self.exact:
            return "limits"
        witness = witness_of(theirs.format)
        if ours.format == theirs.format or not theirs.format.quantised or witness.claims(ours.format):
            return "values"
        return "bytes" if witness.has_reference else "limits"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A weight of the output against the source's; `equal`: all values are the source's, bit for bit.

    `judged_by` is what Standard.judge says, `changed` counts groups whose values are not the source's, but those that a
    conversion plans and counts. `use` is None of a format without codes, `fault` a sentence or None. `equal`, `errors` and
    `use` are of the rows that were measured, which are all unless compare_weights was told otherwise.
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
    changed: int = 0


def changes(comparisons: Iterable[Comparison]) -> Iterator[str]:
    """Which groups have other values than the source's, as planned."""
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.changed:
            found.setdefault(comparison.output_format, []).append(comparison)
    for label, group in found.items():
        groups = counted(sum(comparison.changed for comparison in group), "group")
        which = CHANGED[label].format(f"{groups} in {counted(len(group), 'weight')}")
        yield f"{which}; first in {group[0].name!r}"


@dataclass
class _Figures:
    """What has been measured of a weight, piece by piece."""

    measured: Measured = field(default_factory=Measured)
    usage: Usage | None = None
    changed: int = 0
    equal: bool = True

    def add(self, rows: Rows) -> None:
        self.measured.add(rows.expected, rows.found, rows.first)
        self.equal &= same_bits(rows.expected.to(rows.found.dtype), rows.found)
        usage = usage_of(rows.theirs.format, rows.output, (rows.last - rows.first, rows.theirs.cols), rows.found)
        self.usage = self.usage + usage if self.usage and usage else usage

    def result(self, format: Format) -> tuple[Errors, Spread, GridUse | None]:
        """Of the rows, which are in this format."""
        errors, by_sqnr = self.measured.result()
        if self.usage is None:
            return errors, Spread(rows=by_sqnr), None
        spread = self.usage.spread(format)
        return errors, spread + Spread(rows=by_sqnr), grid_use(spread, self.usage.zero_groups)


def compare_weights(
    ours: Weight,
    theirs: Weight,
    source: Reader,
    output: Reader,
    standard: Standard,
    desk: Desk,
    thorough: bool,
    quickly: bool = True,
) -> tuple[Comparison, Spread]:
    """Every row of the two, a piece at a time; the first fault, and what was measured all the same.

    Figures are of all rows if `thorough` or held to limits, else of the first few, and of those that differ or may be infinite.
    What does not come out as expected is decoded again by the oracle, which has the last word; unless `quickly` all is.
    """
    judge = standard.judge(ours, theirs)
    thorough |= judge == "limits"
    fault = _constant_fault(theirs, output) or _companion_fault(ours, theirs, source, output)
    fault = fault or (_input_fault(ours, theirs, source, output) if standard.exact else None)
    figures = _Figures()
    for piece in _pieces(ours, theirs, source, output, desk):
        rows = replace(piece, quickly=quickly)
        different = fault_of(rows, judge)
        if different and quickly:
            rows = replace(piece, quickly=False)
            different = fault_of(rows, judge)
        fault = fault or different
        changed = rows.changed if judge == "values" and not different else 0
        figures.changed += changed
        figures.equal &= different is not None or not (changed or lost_signs(rows))
        if thorough or different or changed or not rows.moderate:
            figures.add(rows)
        elif rows.first == 0:
            figures.add(rows.head())
    errors, spread, use = figures.result(theirs.format)
    fault = fault or _figures_fault(theirs, errors, standard if judge == "limits" else None)
    comparison = Comparison(
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
        errors=errors,
        use=use,
        fault=fault,
        changed=figures.changed,
    )
    return comparison, spread


def _pieces(ours: Weight, theirs: Weight, source: Reader, output: Reader, desk: Desk) -> Iterator[Rows]:
    unit = math.lcm(row_unit(ours), row_unit(theirs))
    row_bytes = max(sum(part.nbytes for part in weight.parts) for weight in (ours, theirs)) / max(ours.rows, 1)
    count = max(unit, int(CHUNK / max(row_bytes, 1)) // unit * unit)
    firsts = range(0, ours.rows if ours.cols else 0, count)

    def read(number: int) -> Rows:
        first, last = firsts[number], min(firsts[number] + count, ours.rows)
        mine, yours = desk.rooms[number % 2]
        wanted = read_state(ours, source, first, last, mine, desk.ours)
        found = read_state(theirs, output, first, last, yours, desk.theirs)
        return Rows(ours, theirs, wanted, found, first, last, desk)

    for rows in one_ahead(read, len(firsts)):
        yield from rows.pieces()


def _figures_fault(weight: Weight, errors: Errors, standard: Standard | None) -> str | None:
    """What is wrong with the values as a whole; they are held to the limits of `standard` if there is one."""
    if errors.nonfinite:
        return f"tensor {weight.tensors[0].name!r} has a value that is not finite"
    missed = standard.limits_for(weight.format.label).missed(errors) if standard else None
    return f"weight {weight.name!r} ({weight.format.label}): its {missed}{_at(errors.worst)}" if missed else None


def _at(worst: Position | None) -> str:
    if worst is None:
        return ""
    return f"; furthest off at [{worst.row}, {worst.col}]: it is {worst.found!r}, expected is {worst.expected!r}"


def _constant_fault(weight: Weight, reader: Reader) -> str | None:
    for part, tensor in zip(weight.parts, weight.tensors, strict=True):
        if part.constant is not None and reader.read(tensor.file, tensor.start, tensor.nbytes) != part.constant:
            return f"tensor {tensor.name!r} does not say [{weight.rows}, {weight.cols}]"
    return None


def _companion_fault(ours: Weight, theirs: Weight, source: Reader, output: Reader) -> str | None:
    """A weight that was copied, codes and all, has what lies beside it, too; plain values have nothing beside them."""
    if not theirs.format.quantised and theirs.companions:
        return f"tensor {theirs.companions[0].name!r} would scale values that are plain"
    if not theirs.format.quantised or ours.format != theirs.format:
        return None
    wanted, found = ({tensor.name: tensor for tensor in weight.companions} for weight in (ours, theirs))
    for name in sorted(wanted.keys() ^ found.keys()):
        return f"tensor {name!r} is " + ("missing" if name in wanted else "not in the source")
    for name, tensor in wanted.items():
        copy = found[name]
        if (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape):
            return (
                f"tensor {name!r} is {copy.dtype} {list(copy.shape)}, in the source {tensor.dtype} {list(tensor.shape)}"
            )
        if output.read(copy.file, copy.start, copy.nbytes) != source.read(tensor.file, tensor.start, tensor.nbytes):
            return f"tensor {name!r} differs from the source's"
    return None


def _input_fault(ours: Weight, theirs: Weight, source: Reader, output: Reader) -> str | None:
    """The scale of activations beside a weight that was quantised is 1, as nobody has measured any, or what the source had, in
    the other dialect's NVFP4 the inverse of that."""
    if not theirs.format.quantised or ours.format == theirs.format:
        return None
    measured = {tensor.name: source.read(tensor.file, tensor.start, tensor.nbytes) for tensor in ours.companions}
    known = {ONE, *measured.values()}
    if isinstance(theirs.format, Nvfp4):
        scale = measured.get(f"{ours.name}.{INPUTS[not theirs.format.multiplies]}", b"")
        known = {inverse} if (inverse := _inverse(scale)) else known
    for tensor in input_scales(theirs):
        if output.read(tensor.file, tensor.start, tensor.nbytes) not in known:
            made = "if something else than kconvert made this checkpoint, judge it with --close"
            return f"tensor {tensor.name!r} is not 1, nor what the source has measured of activations; {made}"
    return None


def input_scales(weight: Weight) -> list[Tensor]:
    """The scales of activations beside a weight's codes, which are held to what belongs there."""
    ends = tuple(f".{name}" for name in INPUTS.values())
    return [tensor for tensor in weight.companions if weight.format.quantised and tensor.name.endswith(ends)]


def _inverse(scale: bytes) -> bytes:
    """1 / an F32 in F32, as bytes; none where that is no positive number."""
    if len(scale) != F32.size or not 0 < (value := F32.unpack(scale)[0]) < math.inf or value <= 2.0**-128:
        return b""
    return F32.pack(1 / value)


def compare_plain(ours: Plain, theirs: Plain, source: Reader, output: Reader, desk: Desk) -> str | None:
    """Where the bytes of a tensor that is no Linear differ; None when they do not."""
    a, b = ours.tensor, theirs.tensor
    for start in range(0, a.nbytes, CHUNK):
        size = min(CHUNK, a.nbytes - start)
        one = desk.ours.fetch(source, "plain", a.file, a.start + start, size)
        two = desk.theirs.fetch(output, "plain", b.file, b.start + start, size)
        if not same_bytes(one.ctypes.data, two.ctypes.data, size):
            element = (start + int((one != two).argmax())) * math.prod(a.shape) // a.nbytes
            return f"tensor {b.name!r} differs from the source's at element {element}"
    return None
