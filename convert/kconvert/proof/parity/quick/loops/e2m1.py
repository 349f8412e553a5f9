"""MXFP4 and NVFP4: e2m1 codes, and the scales of groups by the reference's rules.

Values are pairs of bf16, the first in the low half of a u32. The
size of a group in pairs is an argument though it never changes: of a loop of known length LLVM makes no vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.conventions import LARGEST_ERROR, NVFP4_STEPS
from kconvert.proof.parity.quick.loops.bits import (
    U,
    bits_of,
    float_of,
    high_half,
    inline,
    low_half,
    mx_rule,
    nearest_e2m1,
    power,
    round_bf16,
    round_e2m1,
    round_e4m3,
    round_pair,
    unit_of,
    widen,
    widen_e2m1,
    widen_e4m3,
)

EXACT, MSE = 0, 2  # ways to scales and codes, beside that of amax
LAST_E4M3, LAST_E8M0 = np.int32(0x7E), np.int32(252)
SIZES = U(0x7FFF7FFF)  # the bits of two bf16 but for the signs
SIZE = U(0x7FFF)


@inline
def _high_e2m1(byte: Any) -> Any:
    return widen_e2m1(np.uint8(byte >> np.uint8(4)))


@inline
def _decode(packed: Any, step: Any, values: Any, first: Any, pairs: Any) -> Any:
    for j in range(first, first + pairs):
        byte = packed[j]
        values[j] = round_pair(widen_e2m1(byte) * step, _high_e2m1(byte) * step)


@inline
def _nv_step(code: Any, other: Any, multiplies: Any) -> Any:
    """An e4m3 scale times the global one, or divided by it."""
    return widen_e4m3(code) * other if multiplies else widen_e4m3(code) / other


def decode_nvfp4(packed: Any, scale: Any, values: Any, groups: Any, pairs: Any, other: Any, multiplies: Any) -> Any:
    """u8 [groups, pairs], e4m3 [groups] -> bf16 [groups, pairs, 2]: f32 products, rounded once."""
    for group in range(groups):
        _decode(packed, _nv_step(scale[group], other, multiplies), values, group * pairs, pairs)
    return 0


def decode_mxfp4(packed: Any, scale: Any, values: Any, groups: Any, pairs: Any) -> Any:
    """The same with u8 exponents [groups], 255 for NaN."""
    for group in range(groups):
        step = power(U(scale[group])) if scale[group] != np.uint8(255) else np.float32(np.inf)
        _decode(packed, step, values, group * pairs, pairs)
    return 0


def nv_steps(scale: Any, steps: Any, groups: Any, other: Any, multiplies: Any) -> Any:
    """e4m3 [groups] -> f32 [groups]."""
    for group in range(groups):
        steps[group] = _nv_step(scale[group], other, multiplies)
    return 0


@inline
def _amax(values: Any, first: Any, pairs: Any) -> Any:
    """The largest magnitude, f32."""
    both = U(0)
    for j in range(first, first + pairs):
        sizes = U(U(values[j]) & SIZES)
        both = max(both, sizes, U(U(sizes << U(16)) | U(sizes >> U(16))))
    return float_of(U(both & U(0x7FFF0000)))


@inline
def _differ(values: Any, first: Any, pairs: Any, step: Any, packed: Any) -> Any:
    """Not zero where a code is not the nearest to value / step, an f32 quotient."""
    differ = U(0)
    for j in range(first, first + pairs):
        one, two = round_e2m1(low_half(values[j]) / step), round_e2m1(high_half(values[j]) / step)
        differ = U(differ | U(U(one | U(two << U(4))) ^ U(packed[j])))
    return differ


@inline
def _differ_by_power(values: Any, first: Any, pairs: Any, inverse: Any, packed: Any, signs: Any) -> Any:
    """_differ, where 1 / step is exact. `signs` is 8 where zeros keep theirs, or 0."""
    differ = U(0)
    for j in range(first, first + pairs):
        word = U(values[j])
        one = U(round_e2m1(low_half(word) * inverse) | U(U(word >> U(12)) & signs))
        two = U(round_e2m1(high_half(word) * inverse) | U(U(word >> U(28)) & signs))
        differ = U(differ | U(U(one | U(two << U(4))) ^ U(packed[j])))
    return differ


@inline
def _lose(values: Any, first: Any, pairs: Any, step: Any, packed: Any) -> Any:
    """Not zero where codes and step do not give back a value, to the bit."""
    differ = U(0)
    for j in range(first, first + pairs):
        byte = packed[j]
        differ = U(differ | U(round_pair(widen_e2m1(byte) * step, _high_e2m1(byte) * step) ^ U(values[j])))
    return differ


@inline
def _served(size: Any, step: Any) -> Any:
    """What the code of a magnitude gives back under the step, as the bits of a bf16."""
    return round_bf16(nearest_e2m1(size / step) * step)


@inline
def _are_codes(values: Any, first: Any, pairs: Any, step: Any) -> Any:
    """Whether all magnitudes are those of a code under the step."""
    differ = U(0)
    for j in range(first, first + pairs):
        sizes = U(U(values[j]) & SIZES)
        served = U(U(_served(low_half(sizes), step)) | U(U(_served(high_half(sizes), step)) << U(16)))
        differ = U(differ | U(served ^ sizes))
    return differ == U(0)


@inline
def _squared(size: Any, step: Any, unit: Any, places: Any) -> Any:
    error = min(abs((size - widen(_served(size, step))) * unit), np.float32(LARGEST_ERROR))
    return np.int32(error * error * places)


@inline
def _error(values: Any, first: Any, pairs: Any, step: Any, unit: Any, places: Any) -> Any:
    """The squared error of a group in fixed point, see reference.packed.squared_error."""
    total = np.int32(0)
    for j in range(first, first + pairs):
        sizes = U(U(values[j]) & SIZES)
        low, high = (low_half(sizes), high_half(sizes))
        total = np.int32(total + np.int32(_squared(low, step, unit, places) + _squared(high, step, unit, places)))
    return total


@inline
def _nv_rule(amax: Any, factor: Any) -> Any:
    """The e4m3 scale of NVFP4 by amax."""
    return max(round_e4m3(amax / (np.float32(6) * factor)), np.uint8(1))


@inline
def _nv_best(values: Any, first: Any, pairs: Any, amax: Any, factor: Any) -> Any:
    """The e4m3 scale of NVFP4 of least squared error."""
    rule, unit, places = np.int32(_nv_rule(amax, factor)), unit_of(amax), np.float32(2.0**25)
    best, least = rule, _error(values, first, pairs, widen_e4m3(np.uint8(rule)) * factor, unit, places)
    for offset in NVFP4_STEPS:
        other = np.int32(rule + np.int32(offset))
        if np.int32(1) <= other <= LAST_E4M3:
            error = _error(values, first, pairs, widen_e4m3(np.uint8(other)) * factor, unit, places)
            if error < least:
                best, least = other, error
    return np.uint8(best)


@inline
def _nv_scale(values: Any, first: Any, pairs: Any, factor: Any, way: Any) -> Any:
    amax = _amax(values, first, pairs)
    return _nv_best(values, first, pairs, amax, factor) if way == MSE else _nv_rule(amax, factor)


@inline
def _wrong_nv_row(
    values: Any, packed: Any, scale: Any, room: Any, row: Any, groups: Any, pairs: Any, factor: Any, way: Any
) -> Any:
    """Not zero where a group of the row has not the scale and the codes of the way."""
    differ, start = U(0), row * groups
    for group in range(groups):
        room[group] = _amax(values, (start + group) * pairs, pairs)
    if way == MSE:
        for group in range(groups):
            best = _nv_best(values, (start + group) * pairs, pairs, room[group], factor)
            differ = U(differ | U(U(best) ^ U(scale[start + group])))
    else:
        for group in range(groups):
            differ = U(differ | U(U(_nv_rule(room[group], factor)) ^ U(scale[start + group])))
    # A loop over the whole row takes longer vectors than those over groups.
    for group in range(groups):
        step = widen_e4m3(scale[start + group]) * factor
        for j in range(group * pairs, group * pairs + pairs):
            room[j] = step
    for j in range(groups * pairs):
        word = values[start * pairs + j]
        one, two = round_e2m1(low_half(word) / room[j]), round_e2m1(high_half(word) / room[j])
        differ = U(differ | U(U(one | U(two << U(4))) ^ U(packed[start * pairs + j])))
    return differ


def wrong_nvfp4(
    values: Any,
    packed: Any,
    scale: Any,
    room: Any,
    rows: Any,
    groups: Any,
    pairs: Any,
    factor: Any,
    other: Any,
    multiplies: Any,
    way: Any,
) -> Any:
    """Whether any group of bf16 [rows, groups, pairs, 2] neither has the scale and the codes of the way nor comes back with its
    own codes and scale. `room` is f32 [groups, pairs].

    A row at a time: only where one differs it is asked which groups do.
    """
    for row in range(rows):
        if not _wrong_nv_row(values, packed, scale, room, row, groups, pairs, factor, way):
            continue
        for group in range(row * groups, row * groups + groups):
            if _lose(values, group * pairs, pairs, _nv_step(scale[group], other, multiplies), packed):
                step = widen_e4m3(scale[group]) * factor
                own = _nv_scale(values, group * pairs, pairs, factor, way)
                if own != scale[group] or _differ(values, group * pairs, pairs, step, packed):
                    return 1
    return 0


@inline
def _mx_best(values: Any, first: Any, pairs: Any, amax: Any) -> Any:
    """The same of least squared error."""
    rule, unit, places = mx_rule(amax, 2), unit_of(amax), np.float32(2.0**24)
    best, least = rule, _error(values, first, pairs, power(U(rule)), unit, places)
    for offset in (-1, 1):
        other = np.int32(rule + np.int32(offset))
        if np.int32(0) <= other <= LAST_E8M0:
            error = _error(values, first, pairs, power(U(other)), unit, places)
            if error < least:
                best, least = other, error
    return best


@inline
def _wrong_mx_codes(values: Any, packed: Any, scale: Any, room: Any, start: Any, groups: Any, pairs: Any) -> Any:
    """Not zero where the codes of some groups, of which zeros are positive, are not the nearest."""
    # A loop over the whole row takes longer vectors than those over groups.
    for group in range(groups):
        inverse = power(U(U(254) - U(scale[start + group])))
        for j in range(group * pairs, group * pairs + pairs):
            room[j] = inverse
    differ = U(0)
    for j in range(groups * pairs):
        word = U(values[start * pairs + j])
        one, two = round_e2m1(low_half(word) * room[j]), round_e2m1(high_half(word) * room[j])
        differ = U(differ | U(U(one | U(two << U(4))) ^ U(packed[start * pairs + j])))
    return differ


def wrong_mxfp4(values: Any, packed: Any, scale: Any, room: Any, rows: Any, groups: Any, pairs: Any, way: Any) -> Any:
    """Whether any group of bf16 [rows, groups, pairs, 2] has not the scale and the codes of the way. `room` is f32 [groups,
    pairs]."""
    for row in range(rows):
        differ, start = U(0), row * groups
        for group in range(groups):
            room[group] = _amax(values, (start + group) * pairs, pairs)
        for group in range(groups):
            first = (start + group) * pairs
            own = _mx_best(values, first, pairs, room[group]) if way == MSE else mx_rule(room[group], 2)
            differ = U(differ | U(U(own) ^ U(scale[start + group])))
        if differ:
            return 1  # with exponents of 254 at most the steps have an exact inverse
        if way != EXACT:
            differ = _wrong_mx_codes(values, packed, scale, room, start, groups, pairs)
        else:
            for group in range(groups):
                first, exponent = (start + group) * pairs, U(scale[start + group])
                signs = U(8) if _are_codes(values, first, pairs, power(exponent)) else U(0)
                inverse = power(U(U(254) - exponent))
                differ = U(differ | _differ_by_power(values, first, pairs, inverse, packed, signs))
        if differ:
            return 1
    return 0


def other_steps(
    powers: Any, scale: Any, packed: Any, groups: Any, halves: Any, pairs: Any, other: Any, multiplies: Any
) -> Any:
    """Whether any of MXFP4's u8 exponents [groups] is another step than NVFP4's e4m3 scales [groups, halves] in its place; of
    groups whose codes, u8 [groups, halves, pairs], are zeros both need only be positive and finite."""
    for group in range(groups):
        step = power(U(powers[group])) if powers[group] != np.uint8(255) else np.float32(np.inf)
        for part in range(group * halves, group * halves + halves):
            own = _nv_step(scale[part], other, multiplies)
            if bits_of(own) == bits_of(step):
                continue
            used = not (np.float32(0) < own < np.float32(np.inf) and step < np.float32(np.inf))
            for j in range(part * pairs, part * pairs + pairs):
                used |= (packed[j] & np.uint8(0x77)) != np.uint8(0)
            if used:
                return 1
    return 0
