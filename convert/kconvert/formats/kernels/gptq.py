"""GPTQ's and AWQ's packed integers, whose matrices lie the other way round than tiles do; see formats.gptq.

`turn` puts the words of a tile's rows one after the other; what a row's codes are is then a matter of bytes and shifts. `steps`
and `zeros` are scales and zero points f32 [groups, rows], of a tile's rows and perhaps more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from kconvert.formats.kernels.bits import address, inline, kernel, round_bf16, widen_scale
from kconvert.formats.kernels.codes import NIBBLES, USUAL, decode_group, differ, look_up, spread_nibbles
from kconvert.formats.kernels.turn import SIDE, turn

BF16 = np.uint16(0)  # what values are rounded like
U = np.uint32  # around every operation on u32, which numba would otherwise widen to 64 bits


@kernel
def widen_scales(scale: Any, first: Any, steps: Any) -> None:
    """scale [groups, out] -> steps f32 [groups, rows] of the rows from `first` on."""
    rows = steps.shape[1]
    for group in range(steps.shape[0]):
        line = scale[group, first : first + rows]
        for row in range(rows):
            steps[group, row] = widen_scale(line[row])


@kernel
def unpack_zeros(words: Any, bits: Any, shifts: Any, carry: Any, plus: Any, keep: Any, codes: Any, zeros: Any) -> None:
    """words u32 [groups, n], codes at `shifts` of each -> zeros f32 [groups, rows]: ((word + carry) >> shift) + plus, of which
    the bits of `keep` are kept; codes u8 [rows] is room.

    Without shifts (there are none of codes that go from one word into the next) `carry` is 0.
    """
    carry, plus, keep, mask = U(carry), U(plus), U(keep), U((1 << bits) - 1)
    groups, rows, count = zeros.shape[0], zeros.shape[1], shifts.shape[0]
    for group in range(groups):
        for k in range(rows // count if count else 0):
            word = U(words[group, k] + carry)
            for j in range(count):
                stored = U(U(word >> shifts[j]) & mask)
                zeros[group, k * count + j] = np.float32(np.int32(U(U(stored + plus) & keep)))
        if not count:
            _spread(words[group], bits, codes)
            for row in range(rows):
                zeros[group, row] = np.float32(np.int32(U(U(U(codes[row]) + plus) & keep)))


@kernel
def spread(words: Any, bits: Any, codes: Any) -> None:
    """words u32 [rows, n] of codes in a stream -> codes u8 [rows, cols]."""
    for row in range(codes.shape[0]):
        _spread(words[row], bits, codes[row])


@inline
def _spread(line: Any, bits: Any, codes: Any) -> None:
    """u32 of codes in a stream, the lowest bits first -> codes u8."""
    if bits == 4:
        spread_nibbles(carray(address(line), 4 * line.shape[0], np.uint8), codes)
    elif bits == 8:
        stored = carray(address(line), 4 * line.shape[0], np.uint8)
        for i in range(codes.shape[0]):  # assigned as a slice they would be copied one by one
            codes[i] = stored[i]
    else:
        _spread_others(line, bits, codes)


@inline
def _spread_others(line: Any, bits: Any, codes: Any) -> None:
    """Four codes at a time, which lie in one word or two."""
    mask, width, cols = U((1 << bits) - 1), U(bits), codes.shape[0]
    for four in range(cols // 4):
        stored = _four(line, four, bits)
        for j in range(4):
            codes[4 * four + j] = np.uint8(U(stored >> U(width * U(j))) & mask)
    for col in range(cols // 4 * 4, cols):
        codes[col] = np.uint8(U(_four(line, col // 4, bits) >> U(width * U(col & 3))) & mask)


@inline
def _four(line: Any, four: Any, bits: Any) -> Any:
    bit = np.uint64(4 * four * bits)
    k = np.int64(bit >> np.uint64(5))
    above = np.uint64(line[min(k + 1, line.shape[0] - 1)]) << np.uint64(32)
    return U((np.uint64(line[k]) | above) >> (bit & np.uint64(31)))


@kernel
def decode(words: Any, bits: Any, steps: Any, zeros: Any, codes: Any, tile: Any) -> Any:
    """words u32 [rows, n], codes in a stream -> tile f32 [rows, groups, g] = bf16((code - zero point) * scale).

    codes u8 [cols] is room. Returns whether a scale is zero over codes that are not their zero point.
    """
    rows, groups, size = tile.shape
    grouped = carray(address(codes), (groups, size), np.uint8)
    senseless = False
    for row in range(rows):
        _spread(words[row], bits, codes)
        for group in range(groups):
            step, zero = steps[group, row], zeros[group, row]
            if size == USUAL:
                decode_group(grouped, row, group, zero, step, BF16, tile, USUAL)
            else:
                decode_group(grouped, row, group, zero, step, BF16, tile, size)
            if step == np.float32(0):
                senseless |= differ(grouped, group, zero)
    return senseless


@kernel
def decode_by_table(
    words: Any,
    height: Any,
    scale: Any,
    zero_words: Any,
    shifts: Any,
    carry: Any,
    plus: Any,
    keep: Any,
    first: Any,
    steps: Any,
    zeros: Any,
    tile: Any,
) -> Any:
    """`decode` of four-bit codes, where codes.LOOKS_UP, and `decode_interleaved`, whose `height` is 8 and not 1.

    Scales [groups, out] and zero points are taken from where they lie in the file, those of the rows from `first` on; see
    unpack_zeros. words are u8 [rows, n] or, interleaved, u32 [rows / 8, >= cols]; the group size is a multiple of 16. Returns
    whether all of it was decoded: it stops at a scale of zero, which may be senseless. steps and zeros f32 [groups, 8] are
    room.
    """
    rows, groups, size = tile.shape
    carry, plus, keep = U(carry), U(plus), U(keep)
    for block in range(0, rows, SIDE):
        out, count, missing = first + block, min(SIDE, rows - block), False
        for group in range(groups):
            word = U(zero_words[group, out >> 3] + carry)
            if count == SIDE:
                missing |= _fill(scale[group, out : out + SIDE], word, shifts, plus, keep, steps, zeros, group, SIDE)
            else:
                missing |= _fill(scale[group, out : out + count], word, shifts, plus, keep, steps, zeros, group, count)
        if missing:
            return False
        for i in range(count):
            shift = np.int64(shifts[i])
            if size == USUAL:
                _look_row_up(words, height, shift, zeros, steps, tile, block, i, USUAL)
            else:
                _look_row_up(words, height, shift, zeros, steps, tile, block, i, size)
    return True


@inline
def _fill(
    scale: Any, word: Any, shifts: Any, plus: Any, keep: Any, steps: Any, zeros: Any, group: Any, count: Any
) -> Any:
    """Scales and zero points of a group in eight rows; whether one of the scales is zero."""
    missing = False
    for i in range(count):
        steps[group, i] = widen_scale(scale[i])
        missing |= steps[group, i] == np.float32(0)
        stored = U(U(word >> U(shifts[i] & U(31))) & U(15))  # what might be shifted by 32 would be done in 64 bits
        zeros[group, i] = np.float32(np.int32(U(U(stored + plus) & keep)))
    return missing


@inline
def _look_row_up(
    words: Any, height: Any, shift: Any, zeros: Any, steps: Any, tile: Any, block: Any, i: Any, size: Any
) -> None:
    """Row `i` of a block, whose scales and zero points are f32 [groups, 8]."""
    row = block + i
    line, halves = (row, 1) if height == 1 else (row >> 3, 0)
    for group in range(tile.shape[1]):
        zero, step = zeros[group, i], steps[group, i]
        for col in range(0, size, NIBBLES):
            look_up(zero, step, words, line, group * size + col >> halves, shift, tile, row, group, col)


@kernel
def decode_interleaved(words: Any, shifts: Any, steps: Any, zeros: Any, tile: Any) -> Any:
    """`decode` of words u32 [rows / 8, >= cols], the codes of eight rows of a column each, at `shifts`."""
    rows, groups, size = tile.shape
    senseless = False
    for row in range(rows):
        line = carray(address(words[row >> 3]), (groups, size), np.uint32)
        shift = U(shifts[row & 7] & U(31))  # what might be 32 and more would be done in 64 bits
        for group in range(groups):
            step, zero = steps[group, row], zeros[group, row]
            for i in range(size):
                code = np.float32(np.int32(U(line[group, i] >> shift) & U(15)))
                tile[row, group, i] = round_bf16((code - zero) * step)
            if step == np.float32(0):
                for i in range(size):
                    senseless |= np.float32(np.int32(U(line[group, i] >> shift) & U(15))) != zero
    return senseless


@kernel
def decode_indexed(
    words: Any, bits: Any, steps: Any, zeros: Any, index: Any, codes: Any, step: Any, zero: Any, tile: Any
) -> Any:
    """`decode` for columns in any order: index u32 [cols] is the group of each; tile f32 [rows, cols].

    A scale and a zero point for each column are looked up for eight rows at once. codes u8 [cols], step and zero f32
    [8, >= cols] are room.
    """
    rows, cols = tile.shape
    alike = _alike(zeros)  # as in symmetric files
    zero[:] = zeros[0, 0]
    senseless = False
    for first in range(0, rows, SIDE):
        count = min(SIDE, rows - first)
        turn(_words(steps), first, index, _words(step)[:count])
        if not alike:
            turn(_words(zeros), first, index, _words(zero)[:count])
        for i in range(count):
            _spread(words[first + i], bits, codes)
            for col in range(cols):
                code = np.float32(np.int32(codes[col])) - zero[i, col]
                tile[first + i, col] = round_bf16(code * step[i, col])
                senseless |= step[i, col] == np.float32(0) and code != np.float32(0)
    return senseless


@inline
def _words(array: Any) -> Any:
    """The bits of f32 [rows, n]."""
    return carray(address(array), array.shape, np.uint32)


@inline
def _alike(zeros: Any) -> Any:
    first, alike = zeros[0, 0], True
    for group in range(zeros.shape[0]):
        for row in range(zeros.shape[1]):
            alike &= zeros[group, row] == first
    return alike
