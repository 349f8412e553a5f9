"""e4m3 with a scale for each block of rows and columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.conventions import LARGEST_ERROR
from kconvert.proof.parity.quick.loops.bits import (
    U,
    float_of,
    inline,
    nearest_e4m3,
    round_bf16,
    round_e4m3,
    unit_of,
    widen,
    widen_e4m3,
)

PLACES = np.float32(2.0**22)


def decode(
    codes: Any, steps: Any, values: Any, rows: Any, cols: Any, height: Any, width: Any, down: Any, across: Any
) -> Any:
    """e4m3 u8 [rows, cols], f32 [down, across], one for each [height, width] -> bf16: f32 products, rounded once."""
    for block in range(down):
        for row in range(block * height, min(rows, block * height + height)):
            for k in range(across):
                step = steps[block * across + k]
                for i in range(row * cols + k * width, row * cols + min(cols, k * width + width)):
                    values[i] = round_bf16(widen_e4m3(codes[i]) * step)
    return 0


def wrong_codes(
    values: Any, steps: Any, codes: Any, rows: Any, cols: Any, height: Any, width: Any, down: Any, across: Any
) -> Any:
    """Whether any of the e4m3 u8 [rows, cols] is not the nearest to bf16 value / f32 step, an f32 quotient."""
    for block in range(down):
        for row in range(block * height, min(rows, block * height + height)):
            differ = U(0)
            for k in range(across):
                step = steps[block * across + k]
                for i in range(row * cols + k * width, row * cols + min(cols, k * width + width)):
                    differ = U(differ | U(np.uint8(round_e4m3(widen(values[i]) / step) ^ codes[i])))
            if differ:
                return 1
    return 0


def largest(values: Any, sizes: Any, rows: Any, cols: Any, height: Any, width: Any, down: Any, across: Any) -> Any:
    """The largest magnitude in each block [height, width] of bf16 [rows, cols] -> bf16 [down, across]."""
    for block in range(down):
        for k in range(across):
            sizes[block * across + k] = np.uint16(0)
        for row in range(block * height, min(rows, block * height + height)):
            for k in range(across):
                size = np.uint16(0)
                for i in range(row * cols + k * width, row * cols + min(cols, k * width + width)):
                    size = max(size, np.uint16(values[i] & np.uint16(0x7FFF)))
                sizes[block * across + k] = max(sizes[block * across + k], size)
    return 0


def best_steps(
    values: Any,
    sizes: Any,
    steps: Any,
    best: Any,
    counts: Any,
    rows: Any,
    cols: Any,
    height: Any,
    width: Any,
    down: Any,
    across: Any,
    choices: Any,
    counters: Any,
) -> Any:
    """Of f32 steps [choices, down, across], the first that has the least squared error on each block of bf16 [rows, cols] ->
    f32 [down, across]. `sizes` are their `largest`, `counts` u32 [4, counters] is room.

    A block has far fewer magnitudes than values: each is tried once, and its error counts as often as it occurs. There are
    counters for 13 binades; the squared errors of what is smaller are less than the last place in which they are summed.
    """
    for block in range(down):
        for k in range(across):
            own = block * across + k
            lowest = max((np.int64(sizes[own]) >> 7) - counters // 128 + 1, 0) << 7
            used = np.int64(sizes[own]) - lowest + 1
            _clear(counts, counters, used)
            for row in range(block * height, min(rows, block * height + height)):
                first, last = row * cols + k * width, row * cols + min(cols, k * width + width)
                _count(values, counts, counters, lowest, first, last)
            _add_up(counts, counters, used)
            unit, least = unit_of(widen(sizes[own])), np.int64(2**62)
            for choice in range(choices):
                step = steps[choice * down * across + own]
                error = _error(counts, lowest, used, step, unit)
                if error < least:
                    best[own], least = step, error
    return 0


@inline
def _clear(counts: Any, counters: Any, used: Any) -> Any:
    for lane in range(4):
        for i in range(used):
            counts[lane * counters + i] = U(0)


@inline
def _count(values: Any, counts: Any, counters: Any, lowest: Any, first: Any, last: Any) -> Any:
    """How often each magnitude from `lowest` on occurs; smaller ones count as that. Each value of four has counters of its own:
    to add to one number again and again takes as long as to add to four."""
    whole = first + (last - first) // 4 * 4
    for i in range(first, whole, 4):
        for lane in range(4):
            counts[lane * counters + _place(values[i + lane], lowest)] += U(1)
    for i in range(whole, last):
        counts[_place(values[i], lowest)] += U(1)


@inline
def _place(value: Any, lowest: Any) -> Any:
    return max(np.int64(np.uint16(value & np.uint16(0x7FFF))) - lowest, 0)


@inline
def _add_up(counts: Any, counters: Any, used: Any) -> Any:
    for i in range(used):
        two = U(counts[i] + counts[counters + i])
        counts[i] = U(two + U(counts[2 * counters + i] + counts[3 * counters + i]))


@inline
def _error(counts: Any, lowest: Any, used: Any, step: Any, unit: Any) -> Any:
    """The squared error of all magnitudes that were counted, see reference.fp8."""
    total = np.int64(0)
    for i in range(used):
        value = float_of(U(U(lowest + i) << U(16)))
        served = widen(round_bf16(nearest_e4m3(value / step) * step))
        error = min(abs((value - served) * unit), np.float32(LARGEST_ERROR))
        total += np.int64(counts[i]) * np.int64(np.int32(error * error * PLACES))
    return total
