"""Rows with one scale each, by the reference's rules, and the order of AMX tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.conventions import AMX_FACTORS, AMX_START, AMX_STRIDES
from kconvert.proof.parity.quick.loops.bits import INFINITE, MAGNITUDE, U, bits_of, float_of, inline, widen

FACTORS = np.array(AMX_FACTORS, np.float32)
TINY = U(0x00800000)  # 2^-126: what is below counts as zero
SHIFT = np.float32(3 * 2**22)  # the last place of numbers of this size is 1
ZERO, ONE = np.float32(0), np.float32(1)


@inline
def _flush(value: Any) -> Any:
    return value if U(bits_of(value) & MAGNITUDE) >= TINY else ZERO


@inline
def _rounded(value: Any, highest: Any) -> Any:
    """Half to even, cut off at -highest and highest."""
    value = value if value > -highest else -highest
    value = value if value < highest else highest
    return value + SHIFT - SHIFT


@inline
def _load(values: Any, first: Any, floats: Any, cols: Any) -> Any:
    """bf16 from `first` on -> f32, flushed; the bits of the largest magnitude."""
    amax = U(0)
    for i in range(cols):
        value = _flush(widen(values[first + i]))
        floats[i] = value
        amax = max(amax, U(bits_of(value) & MAGNITUDE))
    return amax


@inline
def _error(floats: Any, sums: Any, cols: Any, lanes: Any, rule: Any, factor: Any, bits: Any) -> Any:
    """The row's squared error under the scale rule * factor; columns that are equal modulo `lanes` are added up first."""
    scale = rule * factor
    if _flush(scale) == ZERO:
        return np.float32(np.inf)
    inverse, highest = ONE / (scale * np.float32(16 if bits == 4 else 1)), np.float32(7 if bits == 4 else 127)
    for lane in range(lanes):
        sums[lane] = ZERO
    for chunk in range(cols // lanes):
        for lane in range(lanes):
            exact = floats[chunk * lanes + lane] * inverse
            error = exact - _rounded(exact, highest)
            sums[lane] += error * error
    half = lanes // 2
    while half > 0:
        for lane in range(half):
            sums[lane] += sums[half + lane]
        half //= 2
    return sums[0] * (factor * factor)


@inline
def _search(floats: Any, sums: Any, cols: Any, lanes: Any, rule: Any, bits: Any) -> Any:
    """See reference.amx.search."""
    best, least = AMX_START, _error(floats, sums, cols, lanes, rule, FACTORS[AMX_START], bits)
    place = AMX_START + AMX_STRIDES[0]
    while place < len(AMX_FACTORS):
        error = _error(floats, sums, cols, lanes, rule, FACTORS[place], bits)
        if not error < least:
            break
        best, least = place, error
        place += AMX_STRIDES[0]
    for stride in AMX_STRIDES[1:]:
        center = best
        for other in (center - stride, center + stride):
            error = _error(floats, sums, cols, lanes, rule, FACTORS[other], bits)
            if error < least:
                best, least = other, error
    return rule * FACTORS[best]


@inline
def _code(value: Any, inverse: Any, bits: Any, mse: Any) -> Any:
    """Two's complement, in the low bits of an i32. See reference.amx.quantise."""
    if bits == 8:
        return np.int32(_rounded(value * inverse, np.float32(127)))
    if mse:
        return np.int32(_rounded(value * (inverse / np.float32(16)), np.float32(7)))
    wide = np.int32(_rounded(value * inverse, np.float32(127)))
    size = np.int32(np.int32(abs(wide) + np.int32(8)) >> np.int32(4))
    return np.int32(-size if wide < np.int32(0) else size)


def encode(
    values: Any,
    scale: Any,
    lines: Any,
    floats: Any,
    sums: Any,
    rows: Any,
    stride: Any,
    first: Any,
    cols: Any,
    lanes: Any,
    bits: Any,
    mse: Any,
) -> Any:
    """Columns `first` to first + cols of bf16 [rows, stride] -> f32 scales [rows], and the bytes of each row's codes, u8 [rows,
    cols * bits / 8]: of 128 codes of four bits the first 64 are low nibbles. 1 where a value is not finite.

    `floats` f32 [cols] and `sums` f32 [lanes] are room.
    """
    for row in range(rows):
        amax = _load(values, row * stride + first, floats, cols)
        if amax >= INFINITE:
            return 1
        size = float_of(amax)
        step = _flush(size / np.float32(112) if bits == 4 else size * np.float32(1 / 127))
        if mse and step > ZERO:
            step = _search(floats, sums, cols, lanes, step, bits)
        scale[row] = step
        inverse = ONE / step if step > ZERO else ZERO
        if bits == 8:
            for i in range(cols):
                lines[row * cols + i] = np.uint8(_code(floats[i], inverse, bits, mse))
            continue
        for pair in range(cols // 128):
            for i in range(lanes):
                low = _code(floats[pair * 128 + i], inverse, bits, mse)
                high = _code(floats[pair * 128 + 64 + i], inverse, bits, mse)
                lines[(row * cols) // 2 + pair * 64 + i] = np.uint8(np.int32(low & 15) | np.int32(high << 4))
    return 0


@inline
def _first_word(stride: Any, start: Any, band: Any, group: Any, k: Any) -> Any:
    """Of row-major words: 16 rows have a word each, then these rows their next one; after 16 words the other 16 rows."""
    return start + (band * 32 + k // 16 * 16) * stride + group * 16 + k % 16


def wrong_order(
    lines: Any,
    packed: Any,
    rows: Any,
    stride: Any,
    first: Any,
    words: Any,
    height: Any,
    down: Any,
    width: Any,
    across: Any,
) -> Any:
    """Whether `packed` is not words `first` to first + words of u32 [rows, stride] in the order of reference.amx.pack: `down`
    times `across` blocks of [height, width], the last ones may be short."""
    place, differ = 0, U(0)
    for block in range(down):
        for part in range(across):
            start = block * height * stride + first + part * width
            for band in range(min(height, rows - block * height) // 32):
                for group in range(min(width, words - part * width) // 16):
                    for k in range(32):
                        own = _first_word(stride, start, band, group, k)
                        for row in range(16):
                            differ = U(differ | U(lines[own + row * stride] ^ packed[place + row]))
                        place += 16
    return 1 if differ else 0


def unpack(packed: Any, lines: Any, rows: Any, words: Any, height: Any, down: Any, width: Any, across: Any) -> Any:
    """The inverse of that order: u32 [rows * words] -> [rows, words]."""
    place = 0
    for block in range(down):
        for part in range(across):
            start = block * height * words + part * width
            for band in range(min(height, rows - block * height) // 32):
                for group in range(min(width, words - part * width) // 16):
                    for k in range(32):
                        own = _first_word(words, start, band, group, k)
                        for row in range(16):
                            lines[own + row * words] = packed[place + row]
                        place += 16
    return 0


def decode(
    lines: Any, scale: Any, values: Any, rows: Any, cols: Any, stride: Any, first: Any, lanes: Any, bits: Any
) -> Any:
    """The bytes of each row's codes, u8 [rows, cols * bits / 8], f32 [rows] -> columns `first` to first + cols of f32 [rows,
    stride]: code * scale, or for four bits code * (16 * scale)."""
    for row in range(rows):
        own, target = row * cols * bits // 8, row * stride + first
        step = scale[row] * np.float32(16 if bits == 4 else 1)
        if bits == 8:
            for i in range(cols):
                values[target + i] = np.float32(np.int8(lines[own + i])) * step
            continue
        for pair in range(cols // 128):
            for i in range(lanes):
                byte = np.int32(np.int8(lines[own + pair * 64 + i]))
                values[target + pair * 128 + i] = np.float32(np.int32(np.int32(byte << 28) >> 28)) * step
                values[target + pair * 128 + 64 + i] = np.float32(np.int32(byte >> 4)) * step
    return 0
