"""ggml's blocks; see formats.engines.ggml."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import MAGNITUDE, bits_of, float_of, inline, kernel, widen_scale

U, U16 = np.uint32, np.uint16  # around every operation on them, which numba would otherwise widen to 64 bits
LOW, HIGH, FOUR, EIGHT = U16(0x0F), U16(0xF0), U16(4), U16(8)
SIGNS, MINUS_ZERO, UNSIGNED = U16(0x88), np.uint8(0x80), np.uint8(0x7F)
NO_CODES = 0x88  # two codes of zero in a byte of Q4_0
HALF = np.float32(0.5)
OVERFLOW = U(0x477FF000)  # 65,520, from which on F16 has infinity
SMALLEST_NORMAL = U(0x38800000)  # 2^-14
REBIAS = U(112 << 23)
HALF_INFINITE = U(0x7C00)
WIDEST_CODE = np.float32(127)


@inline
def _across(first: Any, second: Any) -> Any:
    """Two bytes of four-bit codes -> a u16 of two bytes: the low nibbles of both in one, the high ones in the next."""
    low = U16((first & LOW) | U16((second & LOW) << FOUR))
    return U16(low | U16(U16(U16(first >> FOUR) | U16(second & HIGH)) << EIGHT))


@inline
def _regroup(codes: Any, block: Any, pairs: Any) -> None:
    """Four-bit codes u8 [n, 16], the first value in the low nibble -> pairs u16 [n, 8] of bytes, of which byte j has value j in
    its low and value j + 16 in its high nibble."""
    for j in range(8):
        pairs[block, j] = _across(U16(codes[block, j]), U16(codes[block, j + 8]))


@inline
def _half(step: Any) -> Any:
    """The bits of the F16 nearest to an f32, half to even; infinity from 65,520 on."""
    bits = bits_of(step)
    sign, size = U((bits >> U(16)) & U(0x8000)), U(bits & MAGNITUDE)
    if size >= OVERFLOW:
        return U(sign | HALF_INFINITE)
    if size >= SMALLEST_NORMAL:
        even = U((size >> U(13)) & U(1))
        return U(sign | U(U(U(size - REBIAS) + U(0xFFF) + even) >> U(13)))
    # The last place of numbers from a half on is that of F16's smallest numbers.
    return U(sign | U(bits_of(float_of(size) + HALF) - bits_of(HALF)))


@inline
def _is_half(step: Any) -> Any:
    """Whether an f32 is one of F16's numbers, which are finite; in less time than to round it, see bits.round_f16."""
    size = U(bits_of(step) & MAGNITUDE)
    if size >= SMALLEST_NORMAL:
        return U(size & U(0x1FFF)) == U(0)
    return (float_of(size) + HALF) - HALF == float_of(size)


@kernel
def recode_q4_0(codes: Any, scale: Any, halves: Any, pairs: Any, other: Any) -> Any:
    """Stored codes u8 [n, 16] and scales of bf16, f16 or f32, each of as many blocks -> halves u16 [n], the scales in F16, and
    pairs u16 [n, 8] of bytes, see _regroup.

    Returns how many groups have another scale under codes that are not zero, the first of which becomes other f32 [1]; -1
    where one is zero over such codes, else -2 where one is beyond F16.
    """
    each = codes.shape[0] // scale.shape[0]
    doubtful = False
    for group in range(scale.shape[0]):
        step = widen_scale(scale[group])
        bits = _half(step)
        doubtful |= (U(bits & HALF_INFINITE) == HALF_INFINITE) | (step == np.float32(0)) | (not _is_half(step))
        for block in range(group * each, (group + 1) * each):
            halves[block] = U16(bits)
            _regroup(codes, block, pairs)
    lost, is_zero, is_beyond = 0, False, False
    for group in range(scale.shape[0] if doubtful else 0):
        step = widen_scale(scale[group])
        if U(_half(step) & HALF_INFINITE) == HALF_INFINITE:
            is_beyond = True
        elif (step == np.float32(0) or not _is_half(step)) and _has_codes(codes, group * each, each):
            is_zero |= step == np.float32(0)
            other[0] = other[0] if lost else step
            lost += 1
    return -1 if is_zero else -2 if is_beyond else lost


@inline
def _has_codes(codes: Any, start: Any, count: Any) -> Any:
    """Whether a code in these blocks is not zero."""
    for block in range(start, start + count):
        for j in range(16):
            if codes[block, j] != NO_CODES:
                return True
    return False


@kernel
def recode_mxfp4(codes: Any, scale: Any, scales: Any, pairs: Any) -> None:
    """Codes u8 [n, 16] and their scales u8 [n] -> scales u8 [n], pairs u16 [n, 8] of bytes, see _regroup."""
    for block in range(codes.shape[0]):
        scales[block] = scale[block]
        _regroup(codes, block, pairs)


@kernel
def recode_nvfp4(codes: Any, scale: Any, blocks: Any) -> None:
    """Codes u8 [4 n, 8] and their scales u8 [4 n] of e4m3 bits -> blocks u16 [n, 18]: the bits of four scales without their
    signs, and of each group eight bytes, of which byte j has value j in its low and value j + 8 in its high nibble.

    A scale of -0 gives its sign to the codes.
    """
    for block in range(blocks.shape[0]):
        for group in range(4 * block, 4 * block + 4):
            signs = SIGNS if scale[group] == MINUS_ZERO else U16(0)
            place = 2 + 4 * (group & 3)
            for j in range(4):
                first, second = U16(codes[group, j]) ^ signs, U16(codes[group, j + 4]) ^ signs
                blocks[block, place + j] = _across(U16(first), U16(second))
        for pair in range(2):
            one, other = scale[4 * block + 2 * pair] & UNSIGNED, scale[4 * block + 2 * pair + 1] & UNSIGNED
            blocks[block, pair] = U16(U16(one) | U16(U16(other) << EIGHT))


@kernel
def decode_nibbles(blocks: Any, head: Any, values: Any, scale: Any, tile: Any) -> None:
    """Blocks as `regroup` makes them, values f32 [16] of the codes, scale f32 [n] -> tile f32 [n, 32]."""
    for block in range(tile.shape[0]):
        for j in range(16):
            byte = blocks[block, head + j]
            tile[block, j] = values[byte & 15] * scale[block]
            tile[block, j + 16] = values[byte >> 4] * scale[block]


@kernel
def encode_q8_0(tile: Any, scale: Any, codes: Any) -> None:
    """tile f32 [n, 32] -> scale f32 [n], before it is rounded to f16, and codes i8 [n, 32], halves rounded away from zero.

    Where the scale is so small that one over it is infinite, and rounds to zero, all codes are zero.
    """
    for block in range(tile.shape[0]):
        amax = np.float32(0)
        for i in range(32):
            amax = max(amax, abs(tile[block, i]))
        step = amax / WIDEST_CODE
        inverse = np.float32(1) / step if step else np.float32(0)
        inverse = inverse if inverse < np.float32(np.inf) else np.float32(0)
        scale[block] = step
        for i in range(32):
            value = tile[block, i] * inverse
            size = abs(value)
            whole = np.floor(size)
            whole += np.float32(1) if size - whole >= HALF else np.float32(0)
            codes[block, i] = np.int8(whole if value >= 0 else -whole)
