"""MXFP4 and NVFP4: e2m1 codes, and the scales of groups by the reference's rules.

The size of a group is an argument though it never changes: of a loop of known length LLVM makes no vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.conventions import LARGEST_ERROR, NVFP4_STEPS
from kconvert.proof.parity.quick.loops.bits import (
    U,
    float_of,
    inline,
    nearest_e2m1,
    power,
    round_bf16,
    round_e2m1,
    round_e4m3,
    widen,
    widen_e2m1,
    widen_e4m3,
)

EXACT, MSE = 0, 2  # ways to scales and codes, beside that of amax
LAST_E4M3, LAST_E8M0 = np.int32(0x7E), np.int32(252)
SIZE = U(0x7FFF)  # the bits of a bf16 but for the sign


def decode(packed: Any, steps: Any, values: Any, groups: Any, size: Any) -> Any:
    """u8 [groups, size / 2], f32 [groups] -> bf16 [groups, size]: f32 products, rounded once."""
    for group in range(groups):
        step, first = steps[group], group * size // 2
        for j in range(size // 2):
            byte = packed[first + j]
            values[2 * (first + j)] = round_bf16(widen_e2m1(byte) * step)
            values[2 * (first + j) + 1] = round_bf16(widen_e2m1(np.uint8(byte >> np.uint8(4))) * step)
    return 0


@inline
def _amax(values: Any, first: Any, size: Any) -> Any:
    """The largest magnitude, as the bits of an f32."""
    largest = U(0)
    for i in range(size):
        largest = max(largest, U(U(values[first + i]) & SIZE))
    return U(largest << U(16))


@inline
def _differ(values: Any, first: Any, size: Any, step: Any, packed: Any, signs: Any) -> Any:
    """Not zero where a code is not the nearest to value / step, an f32 quotient. `signs` is 8 where zeros keep theirs, or 0."""
    differ = U(0)
    for j in range(size // 2):
        low, high = values[first + 2 * j], values[first + 2 * j + 1]
        one = U(round_e2m1(widen(low) / step) | U(U(U(low) >> U(12)) & signs))
        two = U(round_e2m1(widen(high) / step) | U(U(U(high) >> U(12)) & signs))
        differ = U(differ | U(U(one | U(two << U(4))) ^ U(packed[first // 2 + j])))
    return differ


@inline
def _lose(values: Any, first: Any, size: Any, step: Any, packed: Any) -> Any:
    """Not zero where codes and step do not give back a value, to the bit."""
    differ = U(0)
    for j in range(size // 2):
        byte = packed[first // 2 + j]
        one = round_bf16(widen_e2m1(byte) * step)
        two = round_bf16(widen_e2m1(np.uint8(byte >> np.uint8(4))) * step)
        differ = U(differ | U(U(one) ^ U(values[first + 2 * j])) | U(U(two) ^ U(values[first + 2 * j + 1])))
    return differ


@inline
def _are_codes(values: Any, first: Any, size: Any, step: Any) -> Any:
    """Whether all magnitudes are those of a code under the step."""
    differ = U(0)
    for i in range(size):
        magnitude = U(U(values[first + i]) & SIZE)
        served = round_bf16(nearest_e2m1(widen(magnitude) / step) * step)
        differ = U(differ | U(U(served) ^ magnitude))
    return differ == U(0)


@inline
def _error(values: Any, first: Any, size: Any, step: Any, unit: Any, places: Any) -> Any:
    """The squared error of a group in fixed point, see reference.packed.squared_error."""
    total = np.int32(0)
    for i in range(size):
        magnitude = widen(U(U(values[first + i]) & SIZE))
        served = widen(round_bf16(nearest_e2m1(magnitude / step) * step))
        error = min(abs((magnitude - served) * unit), np.float32(LARGEST_ERROR))
        total = np.int32(total + np.int32(error * error * places))
    return total


@inline
def _unit(amax: Any) -> Any:
    """What makes values of this amax (its bits) smaller than 2."""
    return power(U(U(254) - U(amax >> U(23))))


@inline
def _nv_scale(values: Any, first: Any, size: Any, factor: Any, way: Any) -> Any:
    """The e4m3 scale of a group of NVFP4, by amax or of least squared error."""
    amax = _amax(values, first, size)
    rule = np.int32(max(round_e4m3(float_of(amax) / (np.float32(6) * factor)), np.uint8(1)))
    if way != MSE:
        return np.uint8(rule)
    unit, places = _unit(amax), np.float32(2.0**25)
    best, least = rule, _error(values, first, size, widen_e4m3(np.uint8(rule)) * factor, unit, places)
    for offset in NVFP4_STEPS:
        other = np.int32(rule + np.int32(offset))
        if np.int32(1) <= other <= LAST_E4M3:
            error = _error(values, first, size, widen_e4m3(np.uint8(other)) * factor, unit, places)
            if error < least:
                best, least = other, error
    return np.uint8(best)


def wrong_nvfp4(
    values: Any, packed: Any, scale: Any, steps: Any, rows: Any, groups: Any, size: Any, factor: Any, way: Any
) -> Any:
    """Whether any group of bf16 [rows, groups, size] neither has the scale and the codes of the way nor comes back with its own
    codes and f32 steps.

    A row at a time: only where one differs it is asked which groups do.
    """
    for row in range(rows):
        differ = U(0)
        for group in range(row * groups, row * groups + groups):
            differ = U(differ | U(U(_nv_scale(values, group * size, size, factor, way)) ^ U(scale[group])))
        for group in range(row * groups, row * groups + groups):
            step = widen_e4m3(scale[group]) * factor
            differ = U(differ | _differ(values, group * size, size, step, packed, U(0)))
        if not differ:
            continue
        for group in range(row * groups, row * groups + groups):
            if _lose(values, group * size, size, steps[group], packed):
                step = widen_e4m3(scale[group]) * factor
                own = _nv_scale(values, group * size, size, factor, way)
                if own != scale[group] or _differ(values, group * size, size, step, packed, U(0)):
                    return 1
    return 0


@inline
def _mx_scale(values: Any, first: Any, size: Any, way: Any) -> Any:
    """The biased exponent of a group of MXFP4: that of amax, one more from a mantissa of 1.75 on, less 2."""
    amax = _amax(values, first, size)
    rule = np.int32(max(min(np.int32(U(amax + U(1 << 21)) >> U(23)), np.int32(254)) - np.int32(2), np.int32(0)))
    if way != MSE:
        return np.uint8(rule)
    unit, places = _unit(amax), np.float32(2.0**24)
    best, least = rule, _error(values, first, size, power(U(rule)), unit, places)
    for offset in (-1, 1):
        other = np.int32(rule + np.int32(offset))
        if np.int32(0) <= other <= LAST_E8M0:
            error = _error(values, first, size, power(U(other)), unit, places)
            if error < least:
                best, least = other, error
    return np.uint8(best)


def wrong_mxfp4(values: Any, packed: Any, scale: Any, rows: Any, groups: Any, size: Any, way: Any) -> Any:
    """Whether any group of bf16 [rows, groups, size] has not the scale and the codes of the way."""
    for row in range(rows):
        differ = U(0)
        for group in range(row * groups, row * groups + groups):
            differ = U(differ | U(U(_mx_scale(values, group * size, size, way)) ^ U(scale[group])))
        for group in range(row * groups, row * groups + groups):
            step = power(U(scale[group]))
            signs = U(8) if way == EXACT and _are_codes(values, group * size, size, step) else U(0)
            differ = U(differ | _differ(values, group * size, size, step, packed, signs))
        if differ:
            return 1
    return 0
