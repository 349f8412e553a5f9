"""What a quantised weight uses of its grid: codes and scales, counted; whose INT4 convention its codes follow.

The tensors are a weight's own, as compressed-tensors and torch read them; nothing here goes through the kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kconvert.formats import Format
from kconvert.formats.amx import Amx
from kconvert.formats.fp8 import Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import GROUP, Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.stacks import MxStack
from kconvert.proof.parity.metrics import TILE_ELEMENTS, Spread
from kconvert.proof.parity.oracle import fp8_scale

if TYPE_CHECKING:
    import torch

    from kconvert.proof.parity.oracle import State

OUTLIER_OCTAVES = 3  # a scale 8 times the weight's median, or more
QUARTERS = 4  # bins to an octave
MAGNITUDES = {2: 0x7FFFFFFF7FFFFFFF, 4: 0x7FFF7FFF7FFF7FFF}  # all bits but the signs of so many floats
LOWEST_BIN = -150 * QUARTERS  # below the smallest f32


@dataclass(frozen=True, slots=True)
class GridUse:
    """Of a weight: the share of its codes that are the largest of the grid by magnitude, how many of the grid's values it
    never uses, groups that are zero throughout, and groups whose scale is OUTLIER_OCTAVES over the weight's median."""

    saturated: float
    unused: int
    zero_groups: int
    outlier_groups: int


def grid_use(spread: Spread, zero_groups: int) -> GridUse:
    """`spread` is that of one weight, with every value of its grid among `codes`."""
    total, largest = sum(spread.codes.values()), max(map(abs, spread.codes))
    if -largest in spread.codes and largest not in spread.codes:
        largest -= 1  # integers have one more code below zero; both ends are meant
    saturated = sum(count for code, count in spread.codes.items() if abs(code) >= largest)
    unused = sum(count == 0 for count in spread.codes.values())
    bound = _median(spread.scales) + OUTLIER_OCTAVES * QUARTERS
    outliers = sum(count for scale, count in spread.scales.items() if scale >= bound)
    return GridUse(saturated / total if total else 0.0, unused, zero_groups, outliers)


def _median(counts: Counter[int]) -> float:
    half = sum(counts.values()) / 2
    for value in sorted(counts):
        half -= counts[value]
        if half <= 0:
            return value
    return math.inf


def spread_of(format: Format, state: State, shape: tuple[int, int]) -> Spread:
    """The codes and scales of rows [rows, cols] = `shape` that `state` spells; an empty one of a format without codes."""
    values = grid(format)
    if values is None:
        return Spread()
    codes: Counter[float] = Counter()
    for value, count in zip(values, _count_codes(format, state, shape), strict=True):
        codes[value] += count  # -0 is 0
    return Spread(codes=codes, scales=_count_scales(_scales(format, state)))


@cache
def grid(format: Format) -> tuple[float, ...] | None:
    """The value of each code in the order in which codes count as unsigned numbers; None where there are no codes."""
    import torch

    match format:
        case Packed():
            half = 2 ** (format.bits - 1)
            return tuple(float(code) for code in range(-half, half))
        case Int8() | Amx():
            half = 2 ** (format.bits - 1)
            return tuple(float(code) for code in (*range(half), *range(-half, 0)))
        case Mx(bits=4) | MxStack() | Nvfp4():
            magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
            return (*magnitudes, *(-magnitude for magnitude in magnitudes))
        case Fp8() | Mx():
            values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
            return tuple(0.0 if math.isnan(value) else value for value in values)  # NaN is found elsewhere
    return None


def _count_codes(format: Format, state: State, shape: tuple[int, int]) -> list[int]:
    import torch

    if isinstance(format, Packed):
        return _count_packed(format, state["weight_packed"], shape)
    if isinstance(format, Amx):
        counts = torch.bincount(_of_shards(state, "weight").view(torch.uint8), minlength=256)
        return _nibbles(counts) if format.bits == 4 else counts.tolist()
    packed = state.get("_blocks" if isinstance(format, MxStack) else "weight_packed")
    stored = state["weight"] if packed is None else packed
    counts = torch.bincount(stored.reshape(-1).view(torch.uint8), minlength=256)
    if isinstance(format, Int8):
        half = 2 ** (format.bits - 1)
        return [*counts[:half].tolist(), *counts[-half:].tolist()]
    return _nibbles(counts) if packed is not None else counts.tolist()


def _count_packed(format: Packed, words: torch.Tensor, shape: tuple[int, int]) -> list[int]:
    import torch

    if shape[1] * format.bits % 32 == 0:
        counts = torch.bincount(words.reshape(-1).view(torch.uint8), minlength=256)
        return _nibbles(counts) if format.bits == 4 else counts.tolist()
    codes = int_codes(format, words, shape).long() + 2 ** (format.bits - 1)
    return torch.bincount(codes.view(-1), minlength=2**format.bits).tolist()


def _nibbles(counts: torch.Tensor) -> list[int]:
    """How often each byte occurs -> how often each nibble does."""
    square = counts.view(16, 16)
    return (square.sum(0) + square.sum(1)).tolist()


def int_codes(format: Packed, words: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The codes of `pack-quantized` words, int8 [rows, cols] = `shape`."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes: torch.Tensor = unpack_from_int32(words.reshape(shape[0], -1), format.bits, shape)
    return codes


def _scales(format: Format, state: State) -> torch.Tensor:
    """f32 or f64, one a group."""
    match format:
        case Mx():
            return (state["weight_scale"].double() - 127).exp2()
        case MxStack():
            return (state["_scales"].double() - 127).exp2()
        case Nvfp4():
            return state["weight_scale"].float() / state["weight_global_scale"].float()
        case Fp8():
            return fp8_scale(format, state)
        case Amx():
            return _of_shards(state, "scale")
    return state["weight_scale"].float()


def _of_shards(state: State, suffix: str) -> torch.Tensor:
    """What the shards of an AMX weight have of this, one after the other."""
    import torch

    return torch.cat([tensor for name, tensor in state.items() if name.endswith(suffix)])


def _count_scales(scales: torch.Tensor) -> Counter[int]:
    """Scales by the floor of 4 log2 of their magnitude, but for zero."""
    import torch

    scales = scales.abs()
    sound = scales[(scales > 0) & scales.isfinite()]
    bins = (sound.log2() * QUARTERS).floor().long() - LOWEST_BIN
    counts = torch.bincount(bins)
    present = counts.nonzero().view(-1)
    return Counter(dict(zip((present + LOWEST_BIN).tolist(), counts[present].tolist(), strict=True)))


def group_columns(format: Format, cols: int) -> int:
    """How many columns of a row share a scale."""
    match format:
        case Packed() | Int8() | Mx():
            return format.group_size or cols
        case MxStack():
            return GROUP
        case Nvfp4():
            return 16
        case Fp8():
            return format.block[1] if format.strategy == "block" else cols
        case Amx(split="cols"):
            return cols // (format.numa // format.pieces)
    return cols


def count_zero_groups(values: torch.Tensor, size: int) -> int:
    """Groups of `size` columns of a row [rows, cols] without a value other than zero; the last may be shorter."""
    import torch

    count = max(1, TILE_ELEMENTS // max(values.shape[1], 1))
    return sum(_zero_groups(tile, size) for tile in torch.split(values, count))


def _zero_groups(values: torch.Tensor, size: int) -> int:
    import torch

    rows, cols = values.shape
    at_once = 8 // values.element_size()
    if size % (8 * at_once) == 0 and cols % size == 0:
        used = values.view(torch.int64).bitwise_and(MAGNITUDES[at_once]) != 0
        used = used.view(torch.int64)  # eight of these at a time
    else:
        used = torch.nn.functional.pad(values != 0, (0, -cols % size))
    return int((~used.view(rows, -(-cols // size), -1).any(-1)).sum())


@dataclass(frozen=True, slots=True)
class Extremes:
    """Of INT4 groups: all, those with codes other than zero, of these those that reach 7 or -7 and none has -8, and those
    with a -8. `+` puts two sets together."""

    groups: int = 0
    used: int = 0
    sevens: int = 0
    eights: int = 0

    def __add__(self, other: Extremes) -> Extremes:
        return Extremes(
            self.groups + other.groups,
            self.used + other.used,
            self.sevens + other.sevens,
            self.eights + other.eights,
        )


def extremes(format: Packed, words: torch.Tensor, shape: tuple[int, int]) -> Extremes:
    """Of the groups of packed four-bit codes."""
    groups = int_codes(format, words, shape).view(-1, group_columns(format, shape[1]))
    lowest, highest = groups.amin(-1), groups.amax(-1)
    used, eight = (lowest != 0) | (highest != 0), lowest == -8
    seven = ~eight & ((lowest == -7) | (highest == 7))
    return Extremes(len(groups), int(used.sum()), int(seven.sum()), int(eight.sum()))


# Of the groups that are used, so many must be as the convention has them: a few may have come from elsewhere.
NEARLY_ALL = 0.999


def convention_of(found: Extremes) -> str | None:
    """The convention whose grid symmetric INT4 codes are on; None for another, such as that of learnt scales.

    Kimi's scale is amax / 7, so every group reaches 7 or -7 and none -8. compressed-tensors' is amax / 7.5: the largest value
    becomes 7 where it is positive and -8 where it is negative, as about half of them are. Smaller scales of either convention,
    as the search for the least squared error finds them, have the same ends.
    """
    if not found.used or found.sevens + found.eights < NEARLY_ALL * found.used:
        return None
    if found.eights <= (1 - NEARLY_ALL) * found.used:
        return "kimi"
    return "compressed-tensors" if 0.25 < found.eights / found.used < 0.75 else None
