"""e4m3 codes with a scale for each block of rows and columns; see formats.fp8.

Every operation on u32 is wrapped in U, because numba would widen it to 64 bits and halve the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from kconvert.formats.conventions import FP8_DIVISORS
from kconvert.formats.kernels.bits import (
    INFINITE,
    MAGNITUDE,
    address,
    as_held,
    bits_of,
    error_places,
    error_unit,
    float_of,
    inline,
    kernel,
    power,
    round_bf16,
    squared_error,
)

U = np.uint32
LARGEST = U(0x43E00000)  # 448 as f32
BELOW_448 = U(0x1FFFFF)  # added to bits, it makes one binade more of a mantissa above that of 448
SMALLEST_BINADE = U(121 << 23)  # 2**-6: below it the steps of e4m3 stay as they are
TO_MAGIC = U(20 << 23)  # adding 2**20 times the binade leaves steps of an eighth of the binade
REBIAS = U(120 << 23)  # exponent bias of f32 less that of e4m3
SMALLEST = np.float32(2.0**-9)  # the smallest e4m3 above zero
SEGMENT = 128  # so many squared errors are summed in 32 bits


@inline
def widen_e4m3(code: Any) -> Any:
    """u8 -> f32, exact, by no subnormal number (see mx.widen_e2m1); 0x7F and 0xFF are NaN."""
    magnitude = U(code & np.uint8(0x7F))
    subnormal = bits_of(np.float32(np.int32(magnitude)) * SMALLEST)
    bits = U(U(magnitude << U(20)) + REBIAS) if magnitude > U(7) else subnormal
    bits = U(bits | INFINITE) if magnitude == U(0x7F) else bits
    return float_of(U(bits | U(U(code & np.uint8(0x80)) << U(24))))


@inline
def round_e4m3(value: Any) -> Any:
    """f32 -> u8, the nearest e4m3, half to even, saturating at 448; not for NaN.

    The addition of `magic` does the rounding: a sum's lowest bit is worth one step of e4m3 in the value's binade.
    """
    bits = bits_of(value)
    magnitude = U(min(U(bits & MAGNITUDE), LARGEST))
    binade = U(max(U(magnitude & INFINITE), SMALLEST_BINADE))
    magic = U(binade + TO_MAGIC)
    steps = U(bits_of(float_of(magnitude) + float_of(magic)) - magic)
    code = U(steps + U(U(binade - SMALLEST_BINADE) >> U(20)))
    return np.uint8(code | U(U(bits >> U(24)) & U(0x80)))


@kernel
def decode_fp8(codes: Any, scale: Any, block_rows: Any, block_cols: Any, tile: Any) -> Any:
    """codes u8 [rows, cols], scale f32 [row blocks, col blocks] -> tile f32 or bf16 [rows, cols] = bf16(e4m3 * scale).

    Returns whether a scale is zero over codes that are not (NaN is not).
    """
    for row in range(tile.shape[0]):
        for block in range(scale.shape[1]):
            step = scale[row // block_rows, block]
            source = codes[row, block * block_cols : (block + 1) * block_cols]
            target = tile[row, block * block_cols : (block + 1) * block_cols]
            for i in range(target.shape[0]):
                target[i] = as_held(round_bf16(widen_e4m3(source[i]) * step), tile)
    return _are_senseless(codes, scale, block_rows, block_cols)


@inline
def _are_senseless(codes: Any, scale: Any, block_rows: Any, block_cols: Any) -> Any:
    """Whether a scale is zero over codes that are not."""
    for group in range(scale.shape[0]):
        for block in range(scale.shape[1]):
            if scale[group, block] == np.float32(0):
                for row in range(group * block_rows, min((group + 1) * block_rows, codes.shape[0])):
                    for col in range(block * block_cols, min((block + 1) * block_cols, codes.shape[1])):
                        if codes[row, col] & np.uint8(0x7F):
                            return True
    return False


@kernel
def has_nan(words: Any, rest: Any) -> Any:
    """Whether one of the codes is NaN, of which eight are in each of words u64 [n], and others in rest u8 [m].

    Of bytes without their signs, only NaN's gets that bit when one is added.
    """
    found = np.uint64(0)
    for i in range(words.shape[0]):
        found |= (words[i] & np.uint64(0x7F7F7F7F7F7F7F7F)) + np.uint64(0x0101010101010101)
    for i in range(rest.shape[0]):
        found |= np.uint64((rest[i] & np.uint8(0x7F)) + np.uint8(1))
    return (found & np.uint64(0x8080808080808080)) != 0


@kernel
def encode_fp8(
    tile: Any, block_rows: Any, block_cols: Any, bf16_scale: Any, search: Any, room: Any, codes: Any, scale: Any
) -> Any:
    """tile f32 [rows, cols] -> codes u8 [rows, cols], scale f32 [row blocks, col blocks]; how many blocks hold Inf or NaN.

    scale = amax / 448 of the block, or if `search`, amax over the one of FP8_DIVISORS that has the least squared error;
    rounded to bf16 when `bf16_scale`, 1 where that is 0; code = e4m3(value / scale). `room` is i64 [3, col blocks].
    Goes row by row and keeps the amax of a row of blocks in `scale`: block by block would miss the TLB at every row.
    """
    faults = 0
    divisors = carray(address(room[2]), scale.shape[1], np.float32)
    divisors[:] = np.float32(448)
    for group in range(scale.shape[0]):
        first, last = group * block_rows, min((group + 1) * block_rows, tile.shape[0])
        steps = scale[group]
        steps[:] = np.float32(0)
        for row in range(first, last):
            _raise_to_amax(tile[row], block_cols, steps)
        if search:
            _choose_divisors(tile[first:last], block_cols, bf16_scale, steps, room[0], room[1], divisors)
        for block in range(steps.shape[0]):
            faults += bits_of(steps[block]) >= INFINITE
            steps[block] = block_step(steps[block], divisors[block], bf16_scale)
        for row in range(first, last):
            _quantise(tile[row], block_cols, steps, codes[row])
    return faults


@kernel
def encode_by_scale(values: Any, step: Any, codes: Any) -> Any:
    """codes u8 [n] = e4m3(values f32 [n] / step). Returns how many values do not come back, -1 at one that is not finite."""
    largest, changed = U(0), 0
    for i in range(codes.shape[0]):
        largest = U(max(largest, U(bits_of(values[i]) & MAGNITUDE)))
        codes[i] = round_e4m3(values[i] / step)
        changed += round_bf16(widen_e4m3(codes[i]) * step) != values[i]
    return -1 if largest >= INFINITE else changed


@kernel
def encode_by_powers(tile: Any, block_rows: Any, block_cols: Any, room: Any, codes: Any, exponents: Any) -> Any:
    """tile f32 [rows, cols] -> codes u8 [rows, cols], exponents + 127 of the scales u8 [row blocks, col blocks].

    `room` is u32 [2, col blocks]. Returns how many blocks have a value that is not code * scale, to the bit; -1 at a value that
    is not finite.
    """
    inexact = 0
    amax, lost = carray(address(room[0]), exponents.shape[1], np.float32), room[1]
    for group in range(exponents.shape[0]):
        first, last = group * block_rows, min((group + 1) * block_rows, tile.shape[0])
        amax[:] = np.float32(0)
        lost[:] = U(0)
        for row in range(first, last):
            _raise_to_amax(tile[row], block_cols, amax)
        for block in range(amax.shape[0]):
            if bits_of(amax[block]) >= INFINITE:
                return -1
            exponents[group, block] = block_exponent(bits_of(amax[block]))
        for row in range(first, last):
            _quantise_by_powers(tile[row], block_cols, exponents[group], codes[row], lost)
        for block in range(lost.shape[0]):
            inexact += lost[block] != U(0)
    return inexact


@inline
def block_exponent(amax: Any) -> Any:
    """That of the smallest power of two that is not less than amax / 448 (from its bits) + 127; of 1 for 0."""
    rounded_up = np.int32(U(amax + BELOW_448) >> U(23)) - np.int32(8)
    return np.uint8(max(rounded_up, np.int32(0)) if amax else np.int32(127))


@inline
def _quantise_by_powers(values: Any, block_cols: Any, exponents: Any, codes: Any, lost: Any) -> None:
    """_quantise; a block's `lost` u32 becomes something else than 0 where a value is not code * scale."""
    for block in range(exponents.shape[0]):
        source = values[block * block_cols : (block + 1) * block_cols]
        target = codes[block * block_cols : (block + 1) * block_cols]
        if 7 <= exponents[block] <= 226:
            lost[block] |= _round_in_place(source, exponents[block], target)
        else:
            step, inverse = power(exponents[block]), power(U(U(254) - U(exponents[block])))
            for i in range(target.shape[0]):
                target[i] = round_e4m3(source[i] * inverse)
                lost[block] |= U(bits_of(widen_e4m3(target[i]) * step) ^ bits_of(source[i]))


@inline
def _round_in_place(values: Any, exponent: Any, codes: Any) -> Any:
    """codes u8 = e4m3(values f32 / scale), of which none is above 448; 0 if they are the values.

    As round_e4m3, without a division: the steps of e4m3 are where the scale puts them, unless that is near the ends of f32.
    """
    lowest = U(U(U(exponent) << U(23)) - U(6 << 23))  # the binade below which steps stay as they are
    offset = U(TO_MAGIC + U(lowest >> U(20)))
    differ = U(0)
    for i in range(codes.shape[0]):
        bits = bits_of(values[i])
        magnitude = U(bits & MAGNITUDE)
        binade = U(max(U(bits & INFINITE), lowest))
        magic = float_of(U(binade + TO_MAGIC))
        total = float_of(magnitude) + magic
        code = U(U(bits_of(total) - binade) + U(U(binade >> U(20)) - offset))
        codes[i] = np.uint8(code | U(U(bits >> U(24)) & U(0x80)))
        differ = U(differ | U(bits_of(total - magic) ^ magnitude))
    return differ


@inline
def _raise_to_amax(values: Any, block_cols: Any, amax: Any) -> None:
    """amax f32 [blocks] becomes at least the largest |value| of each block; compared as integers, where NaN is largest."""
    for block in range(amax.shape[0]):
        source = values[block * block_cols : (block + 1) * block_cols]
        peak = bits_of(amax[block])
        for i in range(source.shape[0]):
            peak = U(max(peak, U(bits_of(source[i]) & MAGNITUDE)))
        amax[block] = float_of(peak)


@inline
def block_step(amax: Any, divisor: Any, bf16_scale: Any) -> Any:
    """The scale of a block."""
    step = amax / divisor
    step = round_bf16(step) if bf16_scale else step
    return step if step > np.float32(0) else np.float32(1)


@inline
def _choose_divisors(
    values: Any, block_cols: Any, bf16_scale: Any, amax: Any, least: Any, errors: Any, divisors: Any
) -> None:
    """divisors f32 [blocks] become those of FP8_DIVISORS, the first ones, with the least error on values f32 [rows, cols].

    `least` and `errors` i64 [blocks] are room.
    """
    least[:] = np.int64(2**62)
    for divisor in FP8_DIVISORS:
        errors[:] = np.int64(0)
        for row in range(values.shape[0]):
            for block in range(amax.shape[0]):
                step = block_step(amax[block], np.float32(divisor), bf16_scale)
                unit = error_unit(bits_of(amax[block]))
                errors[block] += _error(values[row, block * block_cols : (block + 1) * block_cols], step, unit)
        for block in range(amax.shape[0]):
            if errors[block] < least[block]:
                least[block], divisors[block] = errors[block], np.float32(divisor)


@inline
def _error(values: Any, step: Any, unit: Any) -> Any:
    """The squared error of values f32 [n] under a scale, see bits.squared_error, with the places that SEGMENT values have."""
    total, places = np.int64(0), error_places(SEGMENT)
    for first in range(0, values.shape[0], SEGMENT):
        part = values[first : first + SEGMENT]
        if part.shape[0] == SEGMENT:
            total += _segment_error(part, step, unit, places, SEGMENT)
        else:
            total += _segment_error(part, step, unit, places, part.shape[0])
    return total


@inline
def _segment_error(values: Any, step: Any, unit: Any, places: Any, size: Any) -> Any:
    """Of `size` values: of a number that is known when this is compiled, the loop has no rest."""
    error = np.int32(0)
    for i in range(size):
        magnitude = abs(values[i])
        served = round_bf16(_rounded(magnitude / step) * step)
        error = np.int32(error + squared_error(magnitude, served, unit, places))
    return error


@inline
def _rounded(magnitude: Any) -> Any:
    """What round_e4m3 makes of a number that is not negative, widened."""
    bits = U(min(U(bits_of(magnitude)), LARGEST))
    magic = float_of(U(U(max(U(bits & INFINITE), SMALLEST_BINADE)) + TO_MAGIC))
    return (float_of(bits) + magic) - magic


@inline
def _quantise(values: Any, block_cols: Any, steps: Any, codes: Any) -> None:
    """codes u8 = e4m3(values f32 / steps f32 [blocks]), one row."""
    for block in range(steps.shape[0]):
        step = steps[block]
        source = values[block * block_cols : (block + 1) * block_cols]
        target = codes[block * block_cols : (block + 1) * block_cols]
        for i in range(target.shape[0]):
            target[i] = round_e4m3(source[i] / step)
