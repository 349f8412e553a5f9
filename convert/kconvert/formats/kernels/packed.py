"""Packed integer codes with a scale for each group; see formats.packed and formats.conventions.

A scale is bf16 in u16, f16 in i16, or f32 (see bits.widen_scale). `zero` are zero points u32 [ceil(rows / n), groups], n
rows to a word, or i8 [rows, groups], or None.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import overload

from kconvert.formats.conventions import DIVISORS
from kconvert.formats.kernels.bits import (
    INFINITE,
    address,
    amax_bits,
    as_held,
    bits_of,
    error_places,
    error_unit,
    float_of,
    inline,
    kernel,
    largest_bits,
    pack_pairs,
    round_bf16,
    round_bits,
    round_like,
    smallest_bits,
    squared_error,
    widen,
    widen_scale,
)
from kconvert.formats.kernels.codes import USUAL, by_table, decode_by_table, decode_group, differ, spread_nibbles

U = np.uint32  # around every operation on u32, which numba would otherwise widen to 64 bits
LOW_NIBBLE = U(15)
HIGHEST = np.float32(7)
SHIFT = np.float32(3 * 2**22 + 8)  # the last place of numbers of this size is 1, and the last nibble of this one is 8
HEAD = 8  # values that fill a vector
# Codes from 1 to 8 span less than this, rounded products included; values that never were INT4 nearly always span more.
WIDEST = np.float32(8.0625)


def _offset(zero: Any, row: Any, group: Any, bits: Any) -> Any:
    """What is subtracted from a stored code, as f32: 8 or 128, and the zero point, which in packed form has the same offset."""
    raise NotImplementedError("only in kernels")


@overload(_offset, strict=False)
def _offset_of(zero: Any, row: Any, group: Any, bits: Any) -> Any:
    if isinstance(zero, types.NoneType):
        return lambda zero, row, group, bits: np.float32(1 << (bits - 1))
    if zero.dtype == types.int8:
        return lambda zero, row, group, bits: np.float32((1 << (bits - 1)) + zero[row, group])
    return lambda zero, row, group, bits: np.float32(
        np.int32((zero[row * bits >> 5, group] >> np.uint32(row * bits & 31)) & np.uint32((1 << bits) - 1))
    )


@kernel
def decode(packed: Any, bits: Any, scale: Any, zero: Any, spread: Any, tile: Any) -> Any:
    """packed u8 [rows, n] of codes of 4 or 8 `bits`, scale [rows, groups] -> tile f32 or bf16 [rows, groups, g] = (code - zero
    point) * scale. `spread` u8 [cols] is room.

    Returns whether a scale is zero over codes that are not.
    """
    rows, groups, size = tile.shape
    looked_up = by_table(scale, bits, size)
    senseless = False
    for row in range(rows):
        codes = packed[row, : spread.shape[0]]
        if bits == 4:
            codes = spread
        if bits == 4 and not looked_up:
            spread_nibbles(packed[row], spread)
        grouped = carray(address(codes), (groups, size), np.uint8)
        for group in range(groups):
            stored, offset = scale[row, group], _offset(zero, row, group, bits)
            step = widen_scale(stored)
            if looked_up:
                decode_by_table(packed, row, group, offset, step, tile, size)
            elif size == USUAL:
                decode_group(grouped, row, group, offset, step, stored, tile, USUAL)
            else:
                decode_group(grouped, row, group, offset, step, stored, tile, size)
            if step == np.float32(0):
                if looked_up:
                    spread_nibbles(packed[row, group * size >> 1 :], spread[group * size : (group + 1) * size])
                senseless |= differ(grouped, group, offset)
    return senseless


@kernel
def decode_indexed(packed: Any, bits: Any, scale: Any, zero: Any, index: Any, tile: Any) -> Any:
    """packed u8 [rows, bytes], scale [rows, groups], index i32 [cols], each column's group -> tile f32 or bf16 [rows, cols].

    `decode` for columns in any order.
    """
    senseless = False
    for row in range(tile.shape[0]):
        for col in range(tile.shape[1]):
            group = index[col]
            stored = scale[row, group]
            if bits == 4:
                nibble = np.int32((packed[row, col >> 1] >> (4 * (col & 1))) & 15)
                code = np.float32(nibble) - _offset(zero, row, group, 4)
            else:
                code = np.float32(np.int32(packed[row, col])) - _offset(zero, row, group, 8)
            step = widen_scale(stored)
            senseless |= step == np.float32(0) and code != np.float32(0)
            tile[row, col] = as_held(round_like(code * step, stored), tile)
    return senseless


@inline
def shifted(value: Any, step: Any, lowest: Any, rounds: Any) -> Any:
    """The code as f32 code + SHIFT, half to even: the addition leaves no place for a fraction."""
    quotient = value / step
    quotient = round_bf16(quotient) if rounds else quotient
    quotient = quotient if quotient > lowest else lowest
    quotient = quotient if quotient < HIGHEST else HIGHEST
    return quotient + SHIFT


@inline
def step_of(bits: Any) -> Any:
    """What values are divided by. Where a scale is zero they are so small that the division by one gives codes of zero."""
    return widen(bits) if bits else np.float32(1)


@inline
def _quantise(tile: Any, group: Any, bits: Any, lowest: Any, rounds: Any, codes: Any) -> None:
    """The group's codes + 8 under the scale with these bf16 bits -> codes u8 [g]."""
    step = step_of(bits)
    for i in range(tile.shape[1]):
        codes[i] = np.uint8(bits_of(shifted(tile[group, i], step, lowest, rounds)) & LOW_NIBBLE)


@inline
def _quantise_exactly(tile: Any, group: Any, bits: Any, lowest: Any, codes: Any) -> Any:
    """_quantise; 0 if every value is bf16(code * scale), to the bit."""
    step = step_of(bits)
    lost = U(0)
    for i in range(tile.shape[1]):
        code = shifted(tile[group, i], step, lowest, False)
        codes[i] = np.uint8(bits_of(code) & LOW_NIBBLE)
        lost = U(lost | U(bits_of(round_bf16((code - SHIFT) * step)) ^ bits_of(tile[group, i])))
    return lost


@inline
def _plausible(tile: Any, group: Any, bits: Any, lowest: Any) -> Any:
    """Whether the scale reproduces the group's first values; most that are wrong do not, and this is found out fast."""
    step = step_of(bits)
    lost = U(0)
    for i in range(min(HEAD, tile.shape[1])):
        value = tile[group, i]
        product = round_bf16((shifted(value, step, lowest, False) - SHIFT) * step)
        lost = U(lost | U(bits_of(product) ^ bits_of(value)))
    return lost == U(0)


@inline
def rule(amax: Any, divisor: Any, zero_scale: Any) -> Any:
    """bf16 bits of the scale by a convention's rule, from the bits of amax."""
    bits = U(round_bits(float_of(amax) / divisor) >> U(16))
    return bits if bits else U(zero_scale)


@kernel
def encode_rule(
    tile: Any, divisor: Any, lowest: Any, rounds: Any, zero_scale: Any, codes: Any, packed: Any, scale: Any
) -> Any:
    """tile f32 [groups, g] -> packed u8 [groups, g/2], scale u16 [groups] of bf16 bits, by a convention's rule; g even. `codes`
    u8 [g] is room.

    Returns 0, or -1 at the first group with a value that is not finite.
    """
    for group in range(scale.shape[0]):
        amax = amax_bits(tile, group)
        if amax >= INFINITE:
            return -1
        bits = rule(amax, divisor, zero_scale)
        scale[group] = np.uint16(bits)
        _quantise(tile, group, bits, lowest, rounds, codes)
        pack_pairs(codes, group, packed)
    return 0


@inline
def _nearest(amax: Any, m: Any) -> Any:
    """bf16 bits of amax / m."""
    return np.int32(U(round_bits(float_of(amax) / np.float32(m)) >> U(16)))


@kernel
def _search(tile: Any, group: Any, amax: Any, top: Any, lowest: Any, codes: Any) -> Any:
    """The bf16 bits of a scale under which codes from `lowest` to 7 reproduce every value of the group, 0 for none.

    If m is the largest magnitude among the codes, `top` at most, then amax = bf16(m * scale), and the scale is bf16(amax / m)
    or next to it, or exactly that for a power of two. So every scale that can be is tried, and the smallest that does is
    taken: of two that reproduce the values, the one with larger codes is what a rule makes.
    """
    for m in range(top, 0, -1):
        nearest = _nearest(amax, m)
        for k in range(3 if m & (m - 1) else 1):
            bits = nearest + (np.int32(0), np.int32(-1), np.int32(1))[k]
            if bits <= 0 or not _plausible(tile, group, U(bits), lowest):
                continue
            if _quantise_exactly(tile, group, U(bits), lowest, codes) == U(0):
                return U(bits)
    return U(0)


@inline
def may_be_exact(amax: Any, smallest: Any) -> Any:
    """Whether a scale can reproduce the group, by what lies between its values; most that were never quantised cannot."""
    return float_of(amax) <= WIDEST * float_of(smallest)


@inline
def exact_scale(tile: Any, group: Any, amax: Any, lowest: Any, codes: Any) -> Any:
    """_search, the likeliest scale first. 0 also for a group of zeros."""
    # -8 has no counterpart above, so it can only be where no positive value is as large.
    top = np.int32(-lowest) if largest_bits(tile, group) < amax else np.int32(7)
    bits = U(_nearest(amax, top))
    if _quantise_exactly(tile, group, bits, lowest, codes):
        bits = _search(tile, group, amax, top, lowest, codes)
    return bits


@kernel
def encode_exact(
    tile: Any, divisor: Any, lowest: Any, rounds: Any, zero_scale: Any, codes: Any, packed: Any, scale: Any
) -> Any:
    """encode_rule, but a group whose values are all bf16(code * scale) gets such codes and such a scale back.

    Returns the number of groups for which there are none, which get the rule's; -1 as encode_rule.
    """
    inexact = 0
    for group in range(scale.shape[0]):
        amax = amax_bits(tile, group)
        if amax >= INFINITE:
            return -1
        possible = may_be_exact(amax, smallest_bits(tile, group))
        bits = exact_scale(tile, group, amax, lowest, codes) if possible else U(0)
        if bits == U(0):
            bits = rule(amax, divisor, zero_scale)
            if amax or _quantise_exactly(tile, group, bits, lowest, codes):  # a group of zeros is lossless still
                _quantise(tile, group, bits, lowest, rounds, codes)
                inexact += 1
        scale[group] = np.uint16(bits)
        pack_pairs(codes, group, packed)
    return inexact


@inline
def _error(tile: Any, group: Any, bits: Any, lowest: Any, rounds: Any, unit: Any, size: Any) -> Any:
    """The group's squared error under a scale, see bits.squared_error."""
    step = step_of(bits)
    error, places = np.int32(0), error_places(size)
    for i in range(size):
        value = tile[group, i]
        served = round_bf16((shifted(value, step, lowest, rounds) - SHIFT) * step)
        error = np.int32(error + squared_error(value, served, unit, places))
    return error


@inline
def _best(tile: Any, group: Any, amax: Any, divisor: Any, lowest: Any, rounds: Any, zero: Any, size: Any) -> Any:
    """The bf16 bits of the scale with the least squared error; loops of a `size` known when this is compiled have no rest."""
    best = usual = rule(amax, divisor, zero)
    least = _error(tile, group, best, lowest, rounds, error_unit(amax), size)
    for other in DIVISORS:
        bits = rule(amax, np.float32(other), zero)  # one of them is the rule's
        error = least if bits == usual else _error(tile, group, bits, lowest, rounds, error_unit(amax), size)
        best, least = bits if error < least else best, min(error, least)
    return best


@kernel
def encode_mse(
    tile: Any, divisor: Any, lowest: Any, rounds: Any, zero_scale: Any, codes: Any, packed: Any, scale: Any
) -> Any:
    """encode_rule, but of amax / divisor for the rule's divisor and DIVISORS the scale with the least squared error."""
    for group in range(scale.shape[0]):
        amax = amax_bits(tile, group)
        if amax >= INFINITE:
            return -1
        if tile.shape[1] == USUAL:
            best = _best(tile, group, amax, divisor, lowest, rounds, zero_scale, USUAL)
        else:
            best = _best(tile, group, amax, divisor, lowest, rounds, zero_scale, tile.shape[1])
        scale[group] = np.uint16(best)
        _quantise(tile, group, best, lowest, rounds, codes)
        pack_pairs(codes, group, packed)
    return 0
