"""Unpacked eight-bit integers; see formats.int8. Scales as in kernels.packed."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import (
    INFINITE,
    amax_bits,
    bits_of,
    float_of,
    kernel,
    round_bf16,
    round_bits,
    round_like,
    widen,
    widen_scale,
)

SHIFT = np.float32(3 * 2**22)  # the last place of numbers of this size is 1


@kernel
def decode_int8(codes: Any, scale: Any, zero: Any, tile: Any) -> Any:
    """codes i8 [n, groups, g], scale [n, groups], zero i8 [n, groups] or None -> tile f32 [n, groups, g].

    (code - zero point) * scale, rounded to the scale's type. Returns whether a scale is zero over codes that are not.
    """
    senseless = False
    for row in range(tile.shape[0]):
        for group in range(tile.shape[1]):
            stored = scale[row, group]
            step = widen_scale(stored)
            offset = np.int32(0) if zero is None else np.int32(zero[row, group])
            for i in range(tile.shape[2]):
                code = np.int32(codes[row, group, i]) - offset
                tile[row, group, i] = round_like(np.float32(code) * step, stored)
            if step == np.float32(0):
                for i in range(tile.shape[2]):
                    senseless |= np.int32(codes[row, group, i]) != offset
    return senseless


@kernel
def decode_pairs(packed: Any, scale: Any, tile: Any) -> Any:
    """decode_int8 for packed u8 [n / 2, groups, g]: four-bit two's complements, of two rows the first in the low nibble."""
    senseless = False
    for row in range(tile.shape[0]):
        shift = np.uint8(4 * (row & 1))
        for group in range(tile.shape[1]):
            stored = scale[row, group]
            step = widen_scale(stored)
            for i in range(tile.shape[2]):
                code = np.int32((np.int32(packed[row >> 1, group, i] >> shift) & 15) ^ 8) - np.int32(8)
                tile[row, group, i] = round_like(np.float32(code) * step, stored)
            if step == np.float32(0):
                for i in range(tile.shape[2]):
                    senseless |= np.int32(packed[row >> 1, group, i] >> shift) & 15 != 0
    return senseless


@kernel
def encode_int8(tile: Any, divisor: Any, zero_scale: Any, codes: Any, scale: Any) -> Any:
    """tile f32 [rows, cols] -> codes i8 [rows, cols], scale u16 [rows] of bf16 bits; see formats.int8 for the rule.

    Returns 0, or -1 at the first row with a value that is not finite.
    """
    for row in range(tile.shape[0]):
        amax = amax_bits(tile, row)
        if amax >= INFINITE:
            return -1
        bits = np.uint32(round_bits(float_of(amax) / divisor) >> np.uint32(16))
        bits = bits if bits else np.uint32(zero_scale)
        scale[row] = np.uint16(bits)
        step = widen(bits)
        for i in range(tile.shape[1]):
            quotient = round_bf16(tile[row, i] / step)
            quotient = quotient if quotient > np.float32(-128) else np.float32(-128)
            quotient = quotient if quotient < np.float32(127) else np.float32(127)
            # The low byte of the sum is the code, rounded half to even, as a two's complement.
            codes[row, i] = np.int8(np.uint8(bits_of(quotient + SHIFT) & np.uint32(255)))
    return 0
