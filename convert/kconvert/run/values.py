"""What is demanded of values, which a header cannot vouch for: they are looked at while their bytes pass.

On request all of a checkpoint are read beforehand. Scales are a ninth of an INT4 checkpoint's bytes or less, so that a NaN in
the last layer then shows after a minute and not after hours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Reader
from kconvert.errors import KconvertError, Unfit
from kconvert.formats import Part
from kconvert.formats.dtypes import ZERO_DTYPES
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Origin, Step, Transcode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kconvert.formats.base import Bytes

# dtype -> numpy code, sign bit, bits that are all set in Inf and NaN
SCALE_BITS = {
    "BF16": ("u2", 0x8000, 0x7F80),
    "F16": ("u2", 0x8000, 0x7C00),
    "F32": ("u4", 0x80000000, 0x7F800000),
    "F8_E4M3": ("u1", 0x80, 0x7F),
    "F8_E8M0": ("u1", 0, 0xFF),
    "U8": ("u1", 0, 0xFF),  # E8M0 by another name: a power of two, never zero
}
# The bits of 2^100, and of 2^6 where products may be in F16: with any code, a smaller scale gives a finite value.
ENORMOUS = {"BF16": 227 << 7, "F16": 21 << 10, "F32": 227 << 23, "F8_E8M0": 227, "U8": 227}
TINY = 27 << 23  # the bits of 2^-100 as F32, for NVFP4's global scale, which may divide
INTEGER_CODES = {f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}


def is_doubtful(part: Part) -> bool:
    """Whether its bytes may be such that no sound checkpoint has them."""
    return part.values != "any" or any(check is not None for check in (part.constant, part.below, part.unused))


def check_part(step: Step, part: Part, place: Origin, data: Bytes, start: int = 0) -> None:
    """KconvertError for the first value of a part of `step` that is not sound; `data` are its bytes from `start` on."""
    if not is_doubtful(part):
        return
    title = place.title if isinstance(place, Tensor) else f"tensor {part.tensor_of(step.name)!r}"
    where = f"{place.file}: {title}"
    if part.constant is not None and data.tobytes() != part.constant:
        raise KconvertError(
            f"{where} says {data.view(INTEGER_CODES[part.dtype]).tolist()}, but the weight beside it is "
            f"{list(step.shape)}; the file is damaged, or was written wrongly"
        )
    if part.values != "any":
        _check_scale(where, part, data, start)
    if part.below is not None and part.dtype in INTEGER_CODES:
        _check_index(where, part, part.below, data, start)
    if part.unused is not None and not _are_zero(part, part.unused, step.shape[0], data):
        raise KconvertError(
            f"{where} has zero points other than zero, but config.json says that the codes beside it are symmetric; one "
            "of the two is wrong"
        )


@contextmanager
def naming(fault: str, first: int, stop: int) -> Iterator[None]:
    """A format knows what is wrong with a tile, but not whose tile it is."""
    try:
        yield
    except ValueError as error:
        advice = f"; {error.advice}" if isinstance(error, Unfit) else ""
        raise KconvertError(f"{fault}: {error} in rows {first} to {stop - 1}{advice}") from None


def check_values(plan: Plan, finished: Collection[str]) -> None:
    """Read the scales and shapes of every weight still to be converted; KconvertError for the first that is not sound."""
    if plan.source is None:
        return
    doubts = [
        (step, part, place)
        for step in plan.steps
        if any(write.file not in finished for write in step.writes)
        for part, place in zip(step.source_parts, step.reads, strict=True)
        if is_doubtful(part)
    ]
    batches = [doubts[i : i + 128] for i in range(0, len(doubts), 128)]
    with plan.source.reader() as reader, ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as pool:
        for _ in pool.map(lambda batch: _check(batch, reader), batches):
            pass


def _check(doubts: list[tuple[Step, Part, Origin]], reader: Reader) -> None:
    buffers = Buffers()
    for step, part, place in doubts:
        data = buffers.fetch(reader, "doubt", place.file, place.start, part.nbytes)
        check_part(step, part, place, data)
        if isinstance(step, Transcode) and part.values != "any" and step.target.takes_codes(step.source):
            with naming(f"{step.title} cannot be written as {step.target.label}", 0, step.rows):
                step.target.check_scales(part, data)


def _check_scale(where: str, part: Part, data: Bytes, start: int) -> None:
    code, sign, special = SCALE_BITS[part.dtype]
    bits = data.view(code)
    if _is_plainly_sound(bits, code, part.values, sign, special):
        return
    faults = {"is not finite": (bits & special) == special}
    if part.values != "finite":
        faults["is negative"] = (bits & sign != 0) & (bits != sign)
    if part.values == "positive" and sign:
        faults["is zero"] = bits & ~np.array(sign, code) == 0
    for fault, bad in faults.items():
        if bad.any():
            raise KconvertError(
                f"{where} {fault} at {_index(part, bad, start)}; the file is damaged, or was written wrongly"
            )


def _index(part: Part, bad: NDArray[np.bool_], start: int) -> list[int]:
    """Where in the part the first bad value is, of those from byte `start` on."""
    first = start // (part.nbytes // max(math.prod(part.shape), 1)) + int(bad.argmax())
    return [int(i) for i in np.unravel_index(first, part.shape)]


def _is_plainly_sound(bits: NDArray[Any], code: str, values: str, sign: int, special: int) -> bool:
    """Two quick looks: as signed integers, bits are in the order of the positive numbers, and negative ones below zero, of
    which the largest unsigned integer has the largest magnitude."""
    if not bits.size:
        return True
    signed = bits.view(code.replace("u", "i")) if sign else bits
    if signed.max() >= special:
        return False
    if values == "finite":
        return int(bits.max()) % (sign or special) < special
    return bool(signed.min() >= (1 if values == "positive" and sign else 0))


def may_overflow(part: Part, data: Bytes) -> bool:
    """Whether the part has a scale so large that values may be infinite, which only looking at them says."""
    if part.values == "any" or part.dtype not in ENORMOUS or not data.size:
        return False
    code, sign, _ = SCALE_BITS[part.dtype]
    bits = data.view(code)
    signed = bits.view(code.replace("u", "i")) if sign else bits
    largest = max(int(signed.max()), int(bits.max()) & ~sign)
    divides = part.values == "positive" and part.dtype == "F32"
    return largest >= ENORMOUS[part.dtype] or (divides and int(signed.min()) < TINY)


def _are_zero(part: Part, bits: int, rows: int, data: Bytes) -> bool:
    """Whether the zero points that lie beside symmetric codes mean nothing; see Part.unused."""
    if not bits:
        minus_zero = ZERO_DTYPES[part.dtype]
        size = part.nbytes // max(math.prod(part.shape), 1) or 1
        numbers = data.view(f"u{size}")
        return not (numbers & ~np.array(minus_zero, numbers.dtype)).any()
    words = data.view("u4").reshape(part.shape)
    for place in range(min(32 // bits, rows)):
        down = words[: (rows - place - 1) // (32 // bits) + 1]  # the last word may be filled up with anything
        if ((down >> (place * bits) & ((1 << bits) - 1)) != 1 << (bits - 1)).any():
            return False
    return True


def _check_index(where: str, part: Part, below: int, data: Bytes, start: int) -> None:
    """A part of a weight has the numbers of groups, a table those of experts."""
    index = data.view(INTEGER_CODES[part.dtype])
    bad = (index < 0) | (index >= below)
    if bad.any():
        what = "groups" if part.suffix else "experts"
        raise KconvertError(
            f"{where} is {index[int(bad.argmax())]} at {_index(part, bad, start)}, but there are {what} 0 to {below - 1}; the "
            "file is damaged, or was written wrongly"
        )
