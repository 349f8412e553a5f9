"""Rows with one scale each, in the order in which AMX tiles are read; see formats.engines.amx for the order and the rules."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from kconvert.formats.conventions import AMX_FACTORS, AMX_START, AMX_STRIDES
from kconvert.formats.kernels.bits import (
    INFINITE,
    MAGNITUDE,
    address,
    bits_of,
    float_of,
    inline,
    kernel,
    local,
    round_bf16,
)

TINY = np.uint32(0x00800000)  # bits of 2^-126: what is below counts as zero
SHIFT = np.float32(3 * 2**22)  # the last place of numbers of this size is 1
SHIFTED = np.int32(0x4B400000)  # the bits of SHIFT
LANES = 64  # sums of squared errors, each over the columns that are equal modulo LANES
FACTORS = np.array(AMX_FACTORS, np.float32)
LOW_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
ZERO, ONE = np.float32(0), np.float32(1)


@inline
def _magnitude(value: Any) -> Any:
    return np.uint32(bits_of(value) & MAGNITUDE)


@inline
def _flush(value: Any) -> Any:
    """A subnormal number counts as zero."""
    return value if _magnitude(value) >= TINY else ZERO


@inline
def _settle(tile: Any, row: Any, first: Any, values: Any) -> Any:
    """The row's values from column `first` on, rounded to bf16 and flushed -> values f32 [k]; returns the bits of amax."""
    amax = np.uint32(0)
    source = tile[row, first : first + values.shape[0]]
    for i in range(values.shape[0]):
        value = source[i]
        magnitude = _magnitude(value)
        amax = magnitude if magnitude > amax else amax
        values[i] = _flush(round_bf16(value))
    # In the order of bits NaN lies above infinity; it must not be rounded.
    return amax if amax >= INFINITE else _magnitude(_flush(round_bf16(float_of(amax))))


@inline
def _rule(amax: Any, bits: Any) -> Any:
    """The scale that amax (its bits) asks for: a quotient for four bits, the product with a reciprocal for eight."""
    value = float_of(amax)
    return _flush(value / np.float32(112) if bits == 4 else value * np.float32(1 / 127))


@inline
def _clamped(value: Any, highest: Any) -> Any:
    value = value if value > -highest else -highest
    return value if value < highest else highest


@inline
def _code(value: Any, highest: Any) -> Any:
    """Rounded half to even: the addition leaves no place for a fraction."""
    return np.int32(np.int32(bits_of(_clamped(value, highest) + SHIFT)) - SHIFTED)


@inline
def _code_twice(value: Any, highest: Any) -> Any:
    """A four-bit code as kt-kernel makes it: rounded to eight bits first, whose magnitude is then rounded half up."""
    wide = np.int32(np.int32(bits_of(value + SHIFT)) - SHIFTED)
    return np.int32(np.int32(wide + np.int32(8) + np.int32(wide >> np.int32(31))) >> np.int32(4))


@inline
def _quantise(values: Any, inverse: Any, rounding: Any, highest: Any, codes: Any) -> None:
    """values f32 [k] -> codes u8 [k], two's complements."""
    for i in range(codes.shape[0]):
        codes[i] = np.uint8(rounding(values[i] * inverse, highest))


@inline
def _pair(codes: Any, pairs: Any) -> None:
    """Four-bit codes u8 [k] -> u8 [k / 2]: of 128 columns the first 64 are low nibbles, the others high ones."""
    half = codes.shape[0] // 2
    sources, targets = carray(address(codes), half // 4, np.uint64), carray(address(pairs), half // 8, np.uint64)
    for i in range(targets.shape[0]):
        low = i // 8 * 16 + i % 8
        targets[i] = (sources[low] & LOW_NIBBLES) | ((sources[low + 8] & LOW_NIBBLES) << np.uint64(4))


@inline
def _squares(values: Any, inverse: Any, highest: Any, sums: Any) -> Any:
    """Squared error of values * inverse as codes, in units of a code: LANES sums, then halved by adding the second half."""
    for lane in range(LANES):
        sums[lane] = ZERO
    for start in range(0, values.shape[0], LANES):
        part = values[start : start + LANES]
        for lane in range(LANES):
            exact = part[lane] * inverse
            error = exact - np.rint(_clamped(exact, highest))
            sums[lane] += error * error
    width = LANES // 2
    while width:
        for lane in range(width):
            sums[lane] += sums[lane + width]
        width //= 2
    return sums[0]


@kernel
def _error(values: Any, rule: Any, factor: Any, bits: Any, sums: Any) -> Any:
    """The row's squared error under the scale rule * factor, in units of the rule's code; infinite for one that is flushed."""
    scale = rule * factor
    if _flush(scale) == ZERO:
        return np.float32(np.inf)
    if bits == 4:
        return _squares(values, ONE / (scale * np.float32(16)), np.float32(7), sums) * (factor * factor)
    return _squares(values, ONE / scale, np.float32(127), sums) * (factor * factor)


@inline
def _search(values: Any, rule: Any, bits: Any, sums: Any) -> Any:
    """The scale rule * FACTORS[i] with the least squared error, as far as the search of formats.engines.amx finds it."""
    best, least = AMX_START, _error(values, rule, FACTORS[AMX_START], bits, sums)
    for place in range(AMX_START + AMX_STRIDES[0], FACTORS.shape[0], AMX_STRIDES[0]):
        error = _error(values, rule, FACTORS[place], bits, sums)
        if not error < least:
            break
        best, least = place, error
    for stride in AMX_STRIDES[1:]:
        center = best
        for place in (center - stride, center + stride):
            error = _error(values, rule, FACTORS[place], bits, sums)
            if error < least:
                best, least = place, error
    return rule * FACTORS[best]


@inline
def _exchange(half: Any, row: Any, bits: Any, tile: Any, outward: Any) -> None:
    """The words u32 [16, k] of rows `row` and following, to or from their places among those of the tile, u32 [rows, k]."""
    rows, count = tile.shape
    flat = carray(address(tile), rows * count, np.uint32)
    block, run = (128, 448) if bits == 4 else (64, 896)
    first = row // block * block
    within = row - first
    height = min(block, rows - first)
    for k in range(0, count, run):
        width = min(run, count - k)
        base = first * count + k * height + within // 32 * 32 * width + within % 32 * 16
        for group in range(width // 16):
            for word in range(16):
                place = base + group * 512 + word * 16
                for i in range(16):
                    if outward:
                        flat[place + i] = half[i, k + group * 16 + word]
                    else:
                        half[i, k + group * 16 + word] = flat[place + i]


@kernel
def encode_rows(
    tile: Any, first: Any, bits: Any, mse: Any, values: Any, codes: Any, half: Any, words: Any, scale: Any
) -> Any:
    """Columns `first` to first + k of tile f32 [rows, cols] -> words u32 [rows, k * bits / 32], scale f32 [rows].

    Rows are whole blocks; values f32 [k], codes u8 [k] and half u32 [16, k * bits / 32] are room. Returns 0, or -1 at the first
    row with a value that is not finite.
    """
    rows, count = words.shape
    lines, sums = carray(address(half), (16, 4 * count), np.uint8), carray(local(256), LANES, np.float32)
    for row in range(rows):
        amax = _settle(tile, row, first, values)
        if amax >= INFINITE:
            return -1
        step = _rule(amax, bits)
        if mse and step > ZERO:
            step = _search(values, step, bits, sums)
        scale[row] = step
        inverse = ONE / step if step > ZERO else ZERO
        line = lines[row % 16]
        if bits == 8:
            _quantise(values, inverse, _code, np.float32(127), line)
        elif mse:
            _quantise(values, inverse * np.float32(1 / 16), _code, np.float32(7), codes)
            _pair(codes, line)
        else:
            _quantise(values, inverse, _code_twice, ZERO, codes)
            _pair(codes, line)
        if row % 16 == 15:
            _exchange(half, row - 15, bits, words, True)
    return 0


@inline
def _exact(value: Any, highest: Any) -> Any:
    """A code from the f32 that it is."""
    return np.int32(np.int32(bits_of(value + SHIFT)) - SHIFTED)


@kernel
def encode_codes(tile: Any, first: Any, bits: Any, codes: Any, half: Any, words: Any) -> None:
    """encode_rows for columns that are codes already."""
    rows, count = words.shape
    lines = carray(address(half), (16, 4 * count), np.uint8)
    for row in range(rows):
        line = lines[row % 16]
        values = tile[row, first : first + codes.shape[0]]
        _quantise(values, ONE, _exact, ZERO, line if bits == 8 else codes)
        if bits == 4:
            _pair(codes, line)
        if row % 16 == 15:
            _exchange(half, row - 15, bits, words, True)


@kernel
def decode_rows(words: Any, scale: Any, bits: Any, first: Any, half: Any, tile: Any) -> None:
    """The inverse of encode_rows: code * step, or the codes themselves when `scale` is None. half u32 [16, k * bits / 32] is
    room."""
    rows, count = words.shape
    codes = carray(address(half), (16, 4 * count), np.int8)
    for row in range(rows):
        if row % 16 == 0:
            _exchange(half, row, bits, words, False)
        step = ONE if scale is None else scale[row] * np.float32(16 if bits == 4 else 1)
        own = codes[row % 16]
        target = tile[row, first : first + own.shape[0] * 8 // bits]
        if bits == 8:
            for i in range(own.shape[0]):
                target[i] = np.float32(own[i]) * step
        else:
            for start in range(0, own.shape[0], 64):
                source, pair = own[start : start + 64], target[2 * start : 2 * start + 128]
                for i in range(64):
                    byte = np.int32(source[i])
                    pair[i] = np.float32(np.int32(byte << np.int32(28)) >> np.int32(28)) * step
                    pair[64 + i] = np.float32(byte >> np.int32(4)) * step
