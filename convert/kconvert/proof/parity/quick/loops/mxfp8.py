"""MXFP8: e4m3 codes, and the exponents of groups by the reference's rules.

The exponent of least squared error is always that by amax: with one less amax itself is cut off, for smaller errors of what is
too small to count, and with one more there is no code that is not there now.
The size of a group is an argument though it never changes: of a loop of known length LLVM makes no vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.proof.parity.quick.loops.bits import (
    U,
    bits_of,
    inline,
    mx_rule,
    nearest_e4m3,
    power,
    round_bf16,
    round_e4m3,
    widen,
    widen_e4m3,
)

LARGEST = 8  # the exponent of the largest code
FRACTION, FRACTION_OF_448 = U(0x7FFFFF), U(0x600000)


def decode(codes: Any, scale: Any, values: Any, room: Any, rows: Any, groups: Any, size: Any) -> Any:
    """e4m3 u8 [rows, groups, size], u8 exponents [rows, groups], 255 for NaN -> bf16: f32 products, rounded once. `room` is f32
    [groups, size]."""
    for row in range(rows):
        for group in range(groups):
            exponent = scale[row * groups + group]
            step = power(U(exponent)) if exponent != np.uint8(255) else np.float32(np.inf)
            for j in range(group * size, group * size + size):
                room[j] = step
        start = row * groups * size
        for j in range(groups * size):
            values[start + j] = round_bf16(widen_e4m3(codes[start + j]) * room[j])
    return 0


@inline
def _amax(values: Any, first: Any, size: Any) -> Any:
    """The largest magnitude, f32."""
    largest = np.uint16(0)
    for j in range(first, first + size):
        largest = max(largest, np.uint16(values[j] & np.uint16(0x7FFF)))
    return widen(largest)


@inline
def _served(magnitude: Any, step: Any, inverse: Any) -> Any:
    """What the code of a magnitude gives back, as the bits of a bf16."""
    return round_bf16(nearest_e4m3(magnitude * inverse) * step)


@inline
def _is_lost(values: Any, first: Any, size: Any, exponent: Any) -> Any:
    """Whether a magnitude is not that of a code under the scale."""
    step, inverse, differ = power(U(exponent)), power(U(U(254) - U(exponent))), U(0)
    for j in range(first, first + size):
        magnitude = U(values[j] & np.uint16(0x7FFF))
        differ = U(differ | U(U(_served(widen(magnitude), step, inverse)) ^ magnitude))
    return differ != U(0)


@inline
def _exact(values: Any, first: Any, size: Any, amax: Any) -> Any:
    """The exponent by amax, or one less where only that brings back every value. That needs an amax of 448 times the lower
    scale: any other is more, and would be cut off."""
    rule = mx_rule(amax, LARGEST)
    if rule == np.int32(0) or U(bits_of(amax) & FRACTION) != FRACTION_OF_448:
        return rule
    half = np.int32(rule - np.int32(1))
    only_half = _is_lost(values, first, size, rule) and not _is_lost(values, first, size, half)
    return half if only_half else rule


def wrong(values: Any, codes: Any, scale: Any, room: Any, rows: Any, groups: Any, size: Any, exact: Any) -> Any:
    """Whether any group of bf16 [rows, groups, size] has not the scale by amax, or if `exact` by what comes back, and its
    codes. `room` is f32 [groups, size]."""
    for row in range(rows):
        differ, start = U(0), row * groups * size
        for group in range(groups):
            room[group] = _amax(values, start + group * size, size)
        for group in range(groups):
            first, amax = start + group * size, room[group]
            own = _exact(values, first, size, amax) if exact else mx_rule(amax, LARGEST)
            differ = U(differ | U(U(own) ^ U(scale[row * groups + group])))
        if differ:
            return 1  # with exponents of 254 at most the steps have an exact inverse
        # A loop over the whole row takes longer vectors than those over groups.
        for group in range(groups):
            inverse = power(U(U(254) - U(scale[row * groups + group])))
            for j in range(group * size, group * size + size):
                room[j] = inverse
        for j in range(groups * size):
            code = round_e4m3(widen(values[start + j]) * room[j])
            differ = U(differ | U(np.uint8(code ^ codes[start + j])))
        if differ:
            return 1
    return 0
