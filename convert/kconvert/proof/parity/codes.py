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
from kconvert.formats.packed import Packed
from kconvert.proof.parity.metrics import POINTERS, Spread
from kconvert.proof.parity.quick.native import Loop
from kconvert.proof.parity.witnesses.packed import int_codes
from kconvert.proof.parity.witnesses.registry import witness_of

if TYPE_CHECKING:
    import torch

    from kconvert.proof.parity.witnesses.base import State

OUTLIER_OCTAVES = 3  # a scale 8 times the weight's median, or more
QUARTERS = 4  # bins to an octave
BINS, ONE_BIN = 2048 * QUARTERS, 1023 * QUARTERS  # of all f64, and which is that of 1
COUNT_QUARTERS = Loop("figures", "count_quarters", "f8* i8* i8")


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


@dataclass(frozen=True, slots=True)
class Usage:
    """Of some rows of a weight: how often each code occurs, int64, in the order of `grid`; its scales by the floor of 4 log2 of
    their magnitude, int64 [BINS]; groups that are zero throughout. `+` puts two sets of rows together."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_groups: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.codes + other.codes, self.scales + other.scales, self.zero_groups + other.zero_groups)

    def spread(self, format: Format) -> Spread:
        codes: Counter[float] = Counter()
        for value, count in zip(grid(format) or (), self.codes.tolist(), strict=True):
            codes[value] += count  # -0 is 0
        present = self.scales.nonzero().view(-1)
        counted = zip((present - ONE_BIN).tolist(), self.scales[present].tolist(), strict=True)
        return Spread(codes=codes, scales=Counter(dict(counted)))


def usage_of(format: Format, state: State, shape: tuple[int, int], values: torch.Tensor | None = None) -> Usage | None:
    """Of rows [rows, cols] = `shape` that `state` spells, by their `values` too if groups are asked about; None of a format
    without codes."""
    if grid(format) is None:
        return None
    witness = witness_of(format)
    zero_groups = 0 if values is None else count_zero_groups(values, witness.group_columns(shape[1]))
    return Usage(witness.count_codes(state, shape), _count_scales(witness.scales(state)), zero_groups)


def spread_of(format: Format, state: State, shape: tuple[int, int]) -> Spread:
    """The codes and scales of rows [rows, cols] = `shape` that `state` spells; an empty one of a format without codes."""
    usage = usage_of(format, state, shape)
    return usage.spread(format) if usage else Spread()


@cache
def grid(format: Format) -> tuple[float, ...] | None:
    """The value of each code in the order in which codes count as unsigned numbers; None where there are no codes."""
    return witness_of(format).grid()


def _count_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales by the floor of 4 log2 of their magnitude, but for zero: int64 [BINS], see ONE_BIN."""
    import torch

    counts = torch.zeros(BINS, dtype=torch.int64)
    COUNT_QUARTERS(scales.double().contiguous(), counts, scales.numel())
    return counts


def count_zero_groups(values: torch.Tensor, size: int) -> int:
    """Groups of `size` columns of a row [rows, cols] without a value other than zero; the last may be shorter."""
    values = values.contiguous() if str(values.dtype) in POINTERS else values.float()
    return _zero_groups(POINTERS[str(values.dtype)])(values, *values.shape, size)


@cache
def _zero_groups(kind: str) -> Loop:
    return Loop("figures", "count_zero_groups", f"{kind}* i8 i8 i8")


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
    groups = int_codes(format, words, shape).view(-1, witness_of(format).group_columns(shape[1]))
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
