"""Checks before the first byte is written: the paths, and the values that a header cannot vouch for.

Scales are a ninth of an INT4 checkpoint's bytes or less. Reading them first means that a NaN in the last layer shows after
a minute and not after hours. The files of a checkpoint on the Hub are looked at one by one, as they arrive.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.remote import RemoteCheckpoint
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint, Reader
from kconvert.errors import KconvertError
from kconvert.formats import Part
from kconvert.formats.dtypes import ZERO_DTYPES
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Copy, Origin, Step
from kconvert.stores.urls import StoreUrl, parse_store_url

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kconvert.formats.base import Bytes

LARGE = 1 << 16  # bytes that are quicker read past the page cache

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


class Doubt(NamedTuple):
    """A part of the weight [rows, cols] called `name`, or the tensor called so, whose values a header cannot vouch for."""

    name: str
    rows: int
    cols: int
    part: Part
    place: Origin


def check_paths(source: Path, destination: Path) -> None:
    """KconvertError when writing `destination` could touch `source`."""
    source, destination = (Path(os.path.realpath(path)) for path in (source, destination))
    if source == destination:
        raise KconvertError(f"SRC and DST are both {source}; choose another directory for the output")
    if destination.is_relative_to(source):
        raise KconvertError(f"{destination} lies inside SRC; choose a directory outside {source}")
    if source.is_relative_to(destination):
        raise KconvertError(f"SRC lies inside {destination}; choose another directory for the output")


def check_places(source: Checkpoint | None, destination: StoreUrl) -> None:
    """The same of places in object stores."""
    place = parse_store_url(source.name) if isinstance(source, RemoteCheckpoint) else None
    if place is not None and place.overlaps(destination):
        raise KconvertError(f"SRC is {place}, and DST {destination}; choose another place for the output, beside SRC")


def check_side_files(source: Path, names: Iterable[str]) -> None:
    """KconvertError for the first side file that one may not read: they are copied last, and that is hours away."""
    for name in names:
        if not os.access(source / name, os.R_OK):
            raise KconvertError(f"cannot read {source / name}, which goes along into the output; check the permissions")


def check_values(plan: Plan, finished: Collection[str], reader: Reader, source: Path) -> None:
    """Read the scales and shapes of every weight still to be converted; KconvertError for the first that is not sound."""
    doubts = list(doubtful_values(plan, finished))
    batches = [doubts[i : i + 128] for i in range(0, len(doubts), 128)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as pool:
        for _ in pool.map(lambda batch: check_doubts(source, reader, batch), batches):
            pass


def doubtful_values(plan: Plan, finished: Collection[str]) -> Iterator[Doubt]:
    """The parts of the weights still to be converted that must be looked at, and the tables still to be copied."""
    for step in plan.steps:
        if any(place.file not in finished for place in step.writes):
            yield from doubts_of(step)


def doubts_of(step: Step) -> Iterator[Doubt]:
    """What of one step must be looked at."""
    if isinstance(step, Copy):
        if step.below is not None and step.dtype in INTEGER_CODES:
            part = Part("", step.dtype, step.shape, below=step.below)
            yield Doubt(step.name, 0, 0, part, step.reads[0])
        return
    for part, place in zip(step.source_parts, step.reads, strict=True):
        checks = (part.constant, part.below, part.unused)
        if part.values != "any" or any(check is not None for check in checks):
            yield Doubt(step.name, step.rows, step.cols, part, place)


def check_doubts(root: Path, reader: Reader, doubts: Iterable[Doubt]) -> None:
    """KconvertError for the first that is not sound; `root` is how messages name the source."""
    buffers = Buffers()
    for name, rows, cols, part, place in doubts:
        title = place.title if isinstance(place, Tensor) else f"tensor {part.tensor_of(name)!r}"
        where = f"{root / place.file}: {title}"
        if part.nbytes < LARGE:
            data = memoryview(reader.read(place.file, place.start, part.nbytes))
        else:
            data = buffers.fetch(reader, "doubt", place.file, place.start, part.nbytes).data
        if part.constant is not None and data != part.constant:
            code = {"I32": "i", "I64": "q"}[part.dtype]
            values = list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))
            raise KconvertError(
                f"{where} says {values}, but the weight beside it is [{rows}, {cols}]; the file is damaged, or was "
                "written wrongly"
            )
        if part.values != "any":
            _check_scale(where, part, data)
        if part.below is not None:
            _check_index(where, part, part.below, data)
        if part.unused is not None and not _are_zero(part, part.unused, rows, data):
            raise KconvertError(
                f"{where} has zero points other than zero, but config.json says that the codes beside it are symmetric; one "
                "of the two is wrong"
            )


def _check_scale(where: str, part: Part, data: memoryview) -> None:
    import numpy as np

    code, sign, special = SCALE_BITS[part.dtype]
    bits = np.frombuffer(data, code)
    if _is_plainly_sound(bits, code, part.values, sign, special):
        return
    faults = {"is not finite": (bits & special) == special}
    if part.values != "finite":
        faults["is negative"] = (bits & sign != 0) & (bits != sign)
    if part.values == "positive" and sign:
        faults["is zero"] = bits & ~np.array(sign, code) == 0
    for fault, bad in faults.items():
        if bad.any():
            index = [int(i) for i in np.unravel_index(int(bad.argmax()), part.shape)]
            raise KconvertError(f"{where} {fault} at {index}; the file is damaged, or was written wrongly")


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


def _are_zero(part: Part, bits: int, rows: int, data: memoryview) -> bool:
    """Whether the zero points that lie beside symmetric codes mean nothing; see Part.unused."""
    import numpy as np

    if not bits:
        minus_zero = ZERO_DTYPES[part.dtype]
        size = part.nbytes // max(math.prod(part.shape), 1) or 1
        numbers = np.frombuffer(data, f"u{size}")
        return not (numbers & ~np.array(minus_zero, numbers.dtype)).any()
    words = np.frombuffer(data, "u4").reshape(part.shape)
    for place in range(min(32 // bits, rows)):
        down = words[: (rows - place - 1) // (32 // bits) + 1]  # the last word may be filled up with anything
        if ((down >> (place * bits) & ((1 << bits) - 1)) != 1 << (bits - 1)).any():
            return False
    return True


def _check_index(where: str, part: Part, below: int, data: memoryview) -> None:
    """A part of a weight has the numbers of groups, a table those of experts."""
    import numpy as np

    index = np.frombuffer(data, INTEGER_CODES[part.dtype])
    bad = (index < 0) | (index >= below)
    if bad.any():
        first = int(bad.argmax())
        at, what = [int(i) for i in np.unravel_index(first, part.shape)], "groups" if part.suffix else "experts"
        raise KconvertError(
            f"{where} is {index[first]} at {at}, but there are {what} 0 to {below - 1}; the file is damaged, or was written "
            "wrongly"
        )
