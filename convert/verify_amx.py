"""Proof that AMX weights are what their source was packed to: codes and scales unpacked by the reference, in torch.

The source is decoded as `verify` does it, by compressed-tensors and torch; the kernels that wrote the output take no part.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import kconvert
from kconvert.amx import AmxModel, open_amx, weight_name
from kconvert.checkpoint.source import Reader, Tensor
from kconvert.errors import CheckFailed, KconvertError
from kconvert.formats.amx import Amx
from kconvert.model import Model, Weight
from kconvert.oracle import independent_values
from kconvert.plan import Copy
from kconvert.repack import rest_of, routed_experts

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 20  # at a time; bounds the memory of a worker to some 50 MB
COPY_BYTES = 16 << 20
Advance = Callable[[int], None]


@dataclass(frozen=True)
class AmxReport:
    """`weights` whose codes and scales equal the reference's, `tensors` that are the source's, and what packing lost.

    `skipped` weights were not looked at. `relative_frobenius` is the norm of the error over the norm of the weights.
    """

    source: str
    output: str
    scales: str
    weights: int
    tensors: int
    skipped: int
    relative_frobenius: float
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one weight: sums of squares, or what is wrong."""

    signal: float = 0.0
    noise: float = 0.0
    fault: str | None = None


def verify_amx(
    source: str | os.PathLike[str], output: Path, sample: float = 1.0, advance: Advance | None = None
) -> AmxReport:
    """Compare the AMX weights in `output` with the checkpoint `source`; CheckFailed names the first difference.

    `sample` is the share of the weights that is compared, the same ones every time. AMX weights that do not say how their
    scales were made may be either.
    """
    original = kconvert.inspect(source)
    try:
        packed = open_amx(output)
    except KconvertError as error:
        raise CheckFailed(f"the output is not sound: {error}") from None
    pairs = _pairs(original, packed)
    chosen = [pair for pair in pairs if _is_chosen(pair[1].name, sample)] or pairs[:1]
    copies = _copies(original, packed)
    known = packed.record.get("scales")
    rules = (known == "mse",) if known in ("amax", "mse") else (False, True)
    with original.checkpoint.reader() as ours, packed.checkpoint.reader() as theirs:
        signal = noise = 0.0
        advance = advance or (lambda nbytes: None)
        for outcome in _compare_all(chosen, ours, theirs, rules, packed.quantised_for, advance):
            if outcome.fault:
                raise CheckFailed(f"{packed.checkpoint.root}: {outcome.fault}")
            signal, noise = signal + outcome.signal, noise + outcome.noise
        for copy, tensor in copies:
            _compare_copy(copy, tensor, ours, theirs, packed.checkpoint.root)
    return AmxReport(
        source=original.checkpoint.name,
        output=packed.checkpoint.name,
        scales=str(known or "unknown"),
        weights=len(chosen),
        tensors=len(copies),
        skipped=len(pairs) - len(chosen),
        relative_frobenius=math.sqrt(noise / signal) if signal else 0.0,
        sqnr_db=10 * math.log10(signal / noise) if signal and noise else None,
    )


def _pairs(original: Model, packed: AmxModel) -> list[tuple[Weight, Weight]]:
    """Every routed expert's matrix and its counterpart; there are no others."""
    root = packed.checkpoint.root
    wanted = {
        weight_name(w.layer or 0, w.role.partition(".")[2], w.expert or 0): w for w in routed_experts(original).weights
    }
    found = {weight.name: weight for weight in packed.weights}
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckFailed(f"{root}: {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckFailed(f"{root}: {extra[0]!r} is not in the source ({len(extra)} such in all)")
    for name, ours in wanted.items():
        theirs = found[name]
        if (ours.rows, ours.cols) != (theirs.rows, theirs.cols):
            raise CheckFailed(
                f"{root}: {name!r} is [{theirs.rows}, {theirs.cols}], in the source [{ours.rows}, {ours.cols}]"
            )
    return [(ours, found[name]) for name, ours in wanted.items()]


def _is_chosen(name: str, sample: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < sample * 2**64


def _copies(original: Model, packed: AmxModel) -> list[tuple[Copy, Tensor]]:
    """If there is anything besides the experts, it is all of the source's."""
    found = {tensor.name: tensor for tensor in packed.rest}
    wanted = {copy.name: copy for copy in rest_of(original)} if found else {}
    for name in sorted(wanted.keys() ^ found.keys()):
        fault = "is missing" if name in wanted else "is not in the source"
        raise CheckFailed(f"{packed.checkpoint.root}: {name!r} {fault}")
    return [(copy, found[name]) for name, copy in wanted.items()]


def _compare_copy(ours: Copy, theirs: Tensor, source: Reader, output: Reader, root: Path) -> None:
    same = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    for start in range(0, ours.nbytes if same else 0, COPY_BYTES):
        size = min(COPY_BYTES, ours.nbytes - start)
        place = ours.reads[0]
        one, two = (
            source.read(place.file, place.start + start, size),
            output.read(theirs.file, theirs.start + start, size),
        )
        same = same and one == two
    if not same:
        raise CheckFailed(f"{root}: tensor {theirs.name!r} differs from the source's")


def _compare_all(
    pairs: list[tuple[Weight, Weight]],
    ours: Reader,
    theirs: Reader,
    rules: tuple[bool, ...],
    quantised_for: int,
    advance: Advance,
) -> Iterator[Outcome]:
    import torch

    torch.set_num_threads(1)

    def compare(pair: tuple[Weight, Weight]) -> Outcome:
        outcomes = [_compare(*pair, ours, theirs, mse, quantised_for) for mse in rules]
        advance(sum(tensor.nbytes for tensor in pair[1].tensors))
        return next((outcome for outcome in outcomes if not outcome.fault), outcomes[0])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            yield from pool.map(compare, pairs)
        finally:
            pool.shutdown(cancel_futures=True)


def _compare(ours: Weight, theirs: Weight, source: Reader, output: Reader, mse: bool, quantised_for: int) -> Outcome:
    """Every block of rows of every shard: codes and scales are those that the reference makes of the source's values."""
    from kconvert.formats.reference import amx as reference

    format = theirs.format
    assert isinstance(format, Amx)
    signal = noise = 0.0
    for first, last in _blocks(theirs, format):
        values = independent_values(ours, source, first, last)
        for shards, piece in _pieces(values, theirs, format, first, quantised_for):
            packed, scale = reference.encode(piece, format.bits, mse)
            codes = reference.unpack(packed, *_shape(piece), format.bits)
            for n, wanted in zip(shards, codes.chunk(len(shards), 1), strict=True):
                found = reference.unpack(_read(theirs, 2 * n, output, first, last), *_shape(wanted), format.bits)
                found_scale = _read(theirs, 2 * n + 1, output, first, last)
                for tensor, different in ((2 * n + 1, found_scale != scale), (2 * n, found != wanted)):
                    if bool(different.any()):
                        row, *col = different.nonzero()[0].tolist()
                        at = [_row_of_shard(theirs, format, first) + row, *col]
                        name = theirs.tensors[tensor].name
                        return Outcome(fault=f"tensor {name!r} differs from the reference packing at {at} of its shard")
            # Which it has been shown to be, in all its shards.
            served = reference.decode(packed, scale, piece.shape[1], format.bits)
            signal += float(piece.double().square().sum())
            noise += float((piece.double() - served).square().sum())
    return Outcome(signal, noise)


def _shape(matrix: torch.Tensor) -> tuple[int, int]:
    rows, cols = matrix.shape
    return rows, cols


def _row_of_shard(weight: Weight, format: Amx, row: int) -> int:
    """Where this row of the weight is within its shard."""
    return row % (weight.rows // format.numa) if format.split == "rows" else row


def _pieces(
    values: torch.Tensor, weight: Weight, format: Amx, first: int, quantised_for: int
) -> Iterator[tuple[range, torch.Tensor]]:
    """What of the rows from `first` on was quantised together, and the shards in which it is."""
    if format.split == "rows":
        n = first * format.numa // weight.rows
        yield range(n, n + 1), values
        return
    each = format.numa // quantised_for
    for n, piece in enumerate(values.chunk(quantised_for, 1)):
        yield range(n * each, (n + 1) * each), piece


def _blocks(weight: Weight, format: Amx) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whole blocks of one shard."""
    height = weight.rows // format.numa if format.split == "rows" else weight.rows
    count = max(format.block, CHUNK_ELEMENTS // weight.cols // format.block * format.block)
    for start in range(0, weight.rows, height):
        for first in range(start, start + height, count):
            yield first, min(first + count, start + height)


def _read(weight: Weight, index: int, reader: Reader, first: int, last: int) -> torch.Tensor:
    """The bytes of one part for these rows, as its dtype."""
    import torch

    part, tensor = weight.parts[index], weight.tensors[index]
    start, stop = part.span(weight.rows, first, last)
    data = bytearray(reader.read(tensor.file, tensor.start + start, stop - start))
    return torch.frombuffer(data, dtype=torch.int8 if part.dtype == "I8" else torch.float32)
