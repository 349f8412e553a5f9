"""Proof that a checkpoint is what another one was converted to: coverage, integrity and parity.

Parity goes a way of its own: never through the kernels that wrote the output, but through compressed-tensors and torch.
"""

from __future__ import annotations

import filecmp
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kconvert.checkpoint.config import quantization_tables
from kconvert.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint, Reader, open_checkpoint
from kconvert.errors import CheckFailed, KconvertError
from kconvert.formats.dense import Dense
from kconvert.model import Model, Plain, Weight, understand
from kconvert.oracle import expected_parts, independent_values, row_unit

if TYPE_CHECKING:
    from kconvert.oracle import State

CHUNK_ELEMENTS = 4 << 20  # at a time; bounds the memory of a worker to some 100 MB
Advance: TypeAlias = Callable[[int], None]
Pair: TypeAlias = tuple[Weight, Weight] | tuple[Plain, Plain]  # of the source and of the output


@dataclass(frozen=True)
class Report:
    """What was compared; `weights` and `tensors` count those found equal, bit for bit, to what `reference` gives."""

    source: str
    output: str
    reference: str
    weights: int
    tensors: int
    skipped: int
    side_files: int
    dropped: tuple[str, ...]


def verify(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sample: float = 1.0,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    advance: Advance | None = None,
) -> Report:
    """Compare a converted checkpoint with its source, both directories; CheckFailed names the first difference.

    `sample` is the share of the tensors whose values are compared, the same ones every time and some of each role;
    `include` and `exclude` must be those of the conversion. `advance` is called with bytes of output compared.
    """
    include, exclude = tuple(include), tuple(exclude)
    original = understand(open_checkpoint(source)).select(include, exclude)
    converted = _open_output(Path(output), partial=bool(include or exclude))
    pairs = _check_coverage(original, converted)
    _check_config(converted)
    side_files = _check_side_files(original.checkpoint, converted.checkpoint)
    chosen = _choose(pairs, sample)
    with original.checkpoint.reader() as ours, converted.checkpoint.reader() as theirs:
        for fault in _compare_all(chosen, ours, theirs, advance or (lambda nbytes: None)):
            if fault:
                raise CheckFailed(f"{converted.checkpoint.root}: {fault}")
    weights = sum(isinstance(pair[0], Weight) for pair in chosen)
    return Report(
        source=original.checkpoint.name,
        output=converted.checkpoint.name,
        reference=_reference(chosen),
        weights=weights,
        tensors=len(chosen) - weights,
        skipped=len(pairs) - len(chosen),
        side_files=side_files,
        dropped=tuple(tensor.name for tensor in original.dropped),
    )


def _open_output(path: Path, partial: bool) -> Model:
    """The checkpoint to be verified; whatever is unsound about it is a failed check, not bad input."""
    if path.is_dir() and not ((path / INDEX_NAME).exists() and (path / CONFIG_NAME).exists()):
        raise CheckFailed(f"{path} is unfinished, it has no {INDEX_NAME} or {CONFIG_NAME}; run the conversion again")
    try:
        return understand(open_checkpoint(path), partial)
    except KconvertError as error:
        raise CheckFailed(f"the output is not sound: {error}") from None


def _reference(pairs: Iterable[Pair]) -> str:
    """What the outputs were compared with."""
    encoded = any(
        isinstance(ours, Weight) and isinstance(theirs, Weight) and _encoded(ours, theirs) for ours, theirs in pairs
    )
    return (
        "the reference encoding of compressed-tensors decompression" if encoded else "compressed-tensors decompression"
    )


def _encoded(ours: Weight, theirs: Weight) -> bool:
    """Whether the output has the weight in another encoding, which need not hold its values."""
    return ours.format != theirs.format and not isinstance(theirs.format, Dense)


def _check_coverage(original: Model, converted: Model) -> list[Pair]:
    """Every weight and tensor of the source has its counterpart of the same shape, and there are no others."""
    root = converted.checkpoint.root
    weights = {weight.name: weight for weight in original.weights}
    plain = {item.tensor.name: item for item in original.plain}
    converted_weights, converted_plain = _as_in(weights, converted)
    wanted, found = weights.keys() | plain.keys(), converted_weights.keys() | converted_plain.keys()
    if missing := sorted(wanted - found):
        raise CheckFailed(f"{root}: {missing[0]!r} of the source is missing ({len(missing)} in all)")
    if extra := sorted(found - wanted):
        raise CheckFailed(f"{root}: {extra[0]!r} is not in the source ({len(extra)} such in all)")
    pairs: list[Pair] = [(weight, converted_weights[name]) for name, weight in weights.items()]
    pairs += [(item, converted_plain[name]) for name, item in plain.items()]
    for pair in pairs:
        ours, theirs = _spelled(pair[0]), _spelled(pair[1])
        if ours != theirs:
            raise CheckFailed(f"{root}: {theirs}, in the source {ours}")
    return pairs


def _as_in(weights: Mapping[str, Weight], converted: Model) -> tuple[dict[str, Weight], dict[str, Plain]]:
    """The output's weights and plain tensors, told apart as in the source.

    A manifest that demands no names takes an unquantised matrix for a plain tensor.
    """
    found = {weight.name: weight for weight in converted.weights}
    plain = {item.tensor.name: item for item in converted.plain}
    for name in weights.keys() - found.keys():
        if (item := plain.pop(f"{name}.weight", None)) is not None:
            *stack, rows, cols = item.tensor.shape if len(item.tensor.shape) in (2, 3) else (0, 0)
            format = Dense(item.tensor.dtype, stack[0] if stack else None)
            found[name] = Weight(name, item.role, math.prod((*stack, rows)), cols, format, (item.tensor,))
    return found, plain


def _spelled(item: Weight | Plain) -> str:
    """What must be the same on both sides: the shape, and of a plain tensor the dtype."""
    if isinstance(item, Weight):
        return f"{item.name!r} is [{item.rows}, {item.cols}]"
    return f"{item.tensor.name!r} is {item.tensor.dtype} {list(item.tensor.shape)}"


def _check_config(converted: Model) -> None:
    quantised = any(not isinstance(weight.format, Dense) for weight in converted.weights)
    if not quantised and any(quantization_tables(converted.checkpoint.config)):
        raise CheckFailed(
            f"{converted.checkpoint.root / 'config.json'} declares a quantisation, but no weight is quantised; remove it"
        )


def _check_side_files(original: Checkpoint, converted: Checkpoint) -> int:
    for name in original.side_files:
        if name not in converted.side_files:
            raise CheckFailed(f"{converted.root / name} is missing; the source has it")
        if not filecmp.cmp(original.root / name, converted.root / name, shallow=False):
            raise CheckFailed(f"{converted.root / name} differs from the source's")
    return len(original.side_files)


def _choose(pairs: list[Pair], sample: float) -> list[Pair]:
    """The first of each role, and of the rest by a hash of the name, so that every run takes the same."""
    chosen: list[Pair] = []
    roles: set[str] = set()
    for pair in pairs:
        item = pair[0]
        name = item.name if isinstance(item, Weight) else item.tensor.name
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        if item.role not in roles or number < sample * 2**64:
            chosen.append(pair)
        roles.add(item.role)
    return chosen


def _compare_all(pairs: list[Pair], ours: Reader, theirs: Reader, advance: Advance) -> Iterator[str | None]:
    """The fault of each pair, None for none, in order."""
    import torch

    torch.set_num_threads(1)
    compare = functools.partial(_compare, ours=ours, theirs=theirs, advance=advance)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            yield from pool.map(compare, pairs)
        finally:
            pool.shutdown(cancel_futures=True)


def _compare(pair: Pair, ours: Reader, theirs: Reader, advance: Advance) -> str | None:
    match pair:
        case Weight() as a, Weight() as b if _encoded(a, b):
            return _compare_encoded(a, b, ours, theirs, advance)
        case Weight() as a, Weight() as b:
            return _compare_weights(a, b, ours, theirs, advance)
        case Plain(), Plain():
            return _compare_plain(*pair, ours, theirs, advance)
    raise AssertionError(pair)


def _compare_weights(ours: Weight, theirs: Weight, source: Reader, output: Reader, advance: Advance) -> str | None:
    """Values of every row, equal bit for bit and finite."""
    import torch

    unit = math.lcm(row_unit(ours), row_unit(theirs))
    count = max(unit, CHUNK_ELEMENTS // max(ours.cols, 1) // unit * unit)
    for first in range(0, ours.rows, count):
        last = min(first + count, ours.rows)
        expected, found = independent_values(ours, source, first, last), independent_values(theirs, output, first, last)
        expected = expected.to(found.dtype)
        if not torch.equal(expected.view(torch.int16), found.view(torch.int16)):
            row, col = (int(i) for i in (expected.view(torch.int16) != found.view(torch.int16)).nonzero()[0])
            return (
                f"tensor {theirs.tensors[0].name!r} differs at [{first + row}, {col}]: it is {float(found[row, col])!r}, "
                f"compressed-tensors gives {float(expected[row, col])!r}"
            )
        if not bool(torch.isfinite(found).all()):
            return f"tensor {theirs.tensors[0].name!r} has a value that is not finite"
        advance((last - first) * ours.cols * found.element_size())
    return None


def _compare_encoded(ours: Weight, theirs: Weight, source: Reader, output: Reader, advance: Advance) -> str | None:
    """Every byte of the output is what the reference encoder makes of the source's values."""
    import torch

    unit = row_unit(theirs)
    count = max(unit, CHUNK_ELEMENTS // max(ours.cols, 1) // unit * unit)
    for first in range(0, ours.rows, count):
        last = min(first + count, ours.rows)
        found = {}
        for part, tensor in zip(theirs.parts, theirs.tensors, strict=True):
            start, stop = part.span(theirs.rows, first, last)
            data = bytearray(output.read(tensor.file, tensor.start + start, stop - start))
            found[part.suffix] = torch.frombuffer(data, dtype=torch.uint8)
        faults = []
        for expected in expected_parts(independent_values(ours, source, first, last), theirs.format):
            fault = _difference(theirs, expected, found, first)
            if fault is None:
                break
            faults.append(fault)
        else:
            return faults[0]
        advance(sum(map(len, found.values())))
    return None


def _difference(weight: Weight, expected: State, found: State, first: int) -> str | None:
    """Where the bytes found for the rows from `first` on are not those of the tensors expected."""
    import torch

    for part, tensor in zip(weight.parts, weight.tensors, strict=True):
        if part.constant is not None:
            wanted = torch.frombuffer(bytearray(part.constant), dtype=torch.uint8)
        else:
            wanted = expected[part.suffix].contiguous().view(torch.uint8).flatten()
        different = (wanted != found[part.suffix]).nonzero()
        if len(different):
            start, _ = part.span(weight.rows, first, first)
            element = (start + int(different[0])) * math.prod(part.shape) // part.nbytes
            return f"tensor {tensor.name!r} differs from the reference encoding at element {element}"
    return None


def _compare_plain(ours: Plain, theirs: Plain, source: Reader, output: Reader, advance: Advance) -> str | None:
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
