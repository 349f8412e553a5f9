"""GPTQ's and AWQ's packed integers, whose matrices lie the other way round than tiles do; see formats.gptq.

`bring` puts the words of a tile's rows one after the other, which costs a load and a store for each word; what a row's codes
are is then a matter of bytes and shifts. `steps` and `zeros` are scales and zero points f32 [rows, groups]; of the latter there
may be more rows than the tile has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import inline, kernel, round_bf16, widen_scale

U = np.uint32  # around every operation on u32, which numba would otherwise widen to 64 bits


@kernel
def bring(words: Any, first: Any, brought: Any) -> None:
    """words u32 [lines, n], the columns from `first` on -> the rows of brought u32 [rows, >= lines]."""
    lines, rows = words.shape[0], brought.shape[0]
    fours = lines // 4 * 4
    for k in range(0, fours, 4):
        for row in range(rows):
            brought[row, k] = words[k, first + row]
            brought[row, k + 1] = words[k + 1, first + row]
            brought[row, k + 2] = words[k + 2, first + row]
            brought[row, k + 3] = words[k + 3, first + row]
    for k in range(fours, lines):
        for row in range(rows):
            brought[row, k] = words[k, first + row]


@kernel
def widen_scales(scale: Any, first: Any, steps: Any) -> None:
    """scale [groups, out] -> steps f32 [rows, groups] of the rows from `first` on."""
    rows, groups = steps.shape
    for start in range(0, rows // 8 * 8, 8):
        for group in range(groups):
            for row in range(8):
                steps[start + row, group] = widen_scale(scale[group, first + start + row])
    for group in range(groups):
        for row in range(rows // 8 * 8, rows):
            steps[row, group] = widen_scale(scale[group, first + row])


@kernel
def unpack_zeros(words: Any, bits: Any, shifts: Any, carry: Any, plus: Any, keep: Any, zeros: Any) -> None:
    """words u32 [groups, n], codes at `shifts` of each -> zeros f32 [rows, groups]: ((word + carry) >> shift) + plus, of which
    the bits of `keep` are kept.

    Without shifts (there are none of codes that go from one word into the next) `carry` is 0.
    """
    carry, plus, keep, mask = U(carry), U(plus), U(keep), U((1 << bits) - 1)
    rows, groups, count = zeros.shape[0], zeros.shape[1], shifts.shape[0]
    codes = np.empty((1, 0 if count else rows), np.uint8)
    for k in range(rows // count if count else 0):
        for group in range(groups):
            word = U(words[group, k] + carry)
            for j in range(count):
                stored = U(U(word >> shifts[j]) & mask)
                zeros[k * count + j, group] = np.float32(np.int32(U(U(stored + plus) & keep)))
    for group in range(0 if count else groups):
        spread(words[group : group + 1], bits, codes)
        for row in range(rows):
            zeros[row, group] = np.float32(np.int32(U(U(U(codes[0, row]) + plus) & keep)))


@kernel
def spread(words: Any, bits: Any, codes: Any) -> None:
    """words u32 [rows, n] of codes in a stream, the lowest bits first -> codes u8 [rows, cols].

    Four codes at a time, which lie in one word or two.
    """
    mask, width, cols = U((1 << bits) - 1), U(bits), codes.shape[1]
    for row in range(codes.shape[0]):
        line, spelt = words[row], codes[row]
        for four in range(cols // 4):
            stored = _four(line, four, bits)
            for j in range(4):
                spelt[4 * four + j] = np.uint8(U(stored >> U(width * U(j))) & mask)
        for col in range(cols // 4 * 4, cols):
            spelt[col] = np.uint8(U(_four(line, col // 4, bits) >> U(width * U(col & 3))) & mask)


@inline
def _four(line: Any, four: Any, bits: Any) -> Any:
    bit = np.uint64(4 * four * bits)
    k = np.int64(bit >> np.uint64(5))
    above = np.uint64(line[min(k + 1, line.shape[0] - 1)]) << np.uint64(32)
    return U((np.uint64(line[k]) | above) >> (bit & np.uint64(31)))


@kernel
def spread_nibbles(packed: Any, codes: Any) -> None:
    """`spread` of four bits: packed u8 [rows, >= cols / 2] -> codes u8 [rows, cols]."""
    half = codes.shape[1] // 2
    for row in range(codes.shape[0]):
        line, spelt = packed[row], codes[row]
        for j in range(half):
            spelt[2 * j] = line[j] & np.uint8(15)
            spelt[2 * j + 1] = line[j] >> np.uint8(4)
        if codes.shape[1] & 1:
            spelt[2 * half] = line[half] & np.uint8(15)


@kernel
def spread_interleaved(words: Any, shifts: Any, codes: Any) -> None:
    """words u32 [rows / 8, >= cols], the codes of eight rows of a column each, at `shifts` -> codes u8 [rows, cols]."""
    for row in range(codes.shape[0]):
        line, spelt, shift = words[row >> 3], codes[row], shifts[row & 7]
        for col in range(codes.shape[1]):
            spelt[col] = np.uint8(U(line[col] >> shift) & U(15))


@kernel
def decode_bytes(codes: Any, steps: Any, zeros: Any, tile: Any) -> Any:
    """codes u8 [rows, >= groups * g] -> tile f32 [rows, groups, g] = bf16((code - zero point) * scale).

    Returns whether a scale is zero over codes that are not their zero point.
    """
    rows, groups, size = tile.shape
    senseless = False
    for row in range(rows):
        line = codes[row, : groups * size].reshape(groups, size)
        for group in range(groups):
            step, zero = steps[row, group], zeros[row, group]
            for i in range(size):
                tile[row, group, i] = round_bf16((np.float32(np.int32(line[group, i])) - zero) * step)
            if step == np.float32(0):
                for i in range(size):
                    senseless |= np.float32(np.int32(line[group, i])) != zero
    return senseless


@kernel
def decode_indexed(codes: Any, steps: Any, zeros: Any, index: Any, tile: Any) -> Any:
    """decode_bytes for columns in any order: index u32 [cols] is the group of each; tile f32 [rows, cols]."""
    senseless = False
    for row in range(tile.shape[0]):
        line, step, zero = codes[row], steps[row], zeros[row]
        first, alike = zero[0], True
        for group in range(step.shape[0]):
            alike &= zero[group] == first
        if alike:  # as in symmetric files: half of the loads that are out of order
            for col in range(tile.shape[1]):
                tile[row, col] = round_bf16((np.float32(np.int32(line[col])) - first) * step[index[col]])
        else:
            for col in range(tile.shape[1]):
                group = index[col]
                tile[row, col] = round_bf16((np.float32(np.int32(line[col])) - zero[group]) * step[group])
        for group in range(step.shape[0]):
            if step[group] == np.float32(0):
                for col in range(tile.shape[1]):
                    senseless |= index[col] == group and np.float32(np.int32(line[col])) != zero[group]
    return senseless
