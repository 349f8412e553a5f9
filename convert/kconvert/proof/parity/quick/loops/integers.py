"""Four-bit integers: INT4 with a scale for each group, MLX's with a bias besides."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.proof.parity.quick.loops.bits import U, bits_of, float_of, inline, round_bf16, widen


@inline
def _low(byte: Any) -> Any:
    return np.float32(np.int32(byte & np.uint8(15)))


@inline
def _high(byte: Any) -> Any:
    return np.float32(np.int32(byte >> np.uint8(4)))


def decode(packed: Any, scale: Any, values: Any, groups: Any, size: Any) -> Any:
    """u8 [groups, size / 2], bf16 [groups] -> bf16 [groups, size]: codes less 8 times the scale."""
    for group in range(groups):
        step, first = widen(scale[group]), group * size // 2
        for j in range(size // 2):
            byte = packed[first + j]
            values[2 * (first + j)] = round_bf16((_low(byte) - np.float32(8)) * step)
            values[2 * (first + j) + 1] = round_bf16((_high(byte) - np.float32(8)) * step)
    return 0


def multiply(packed: Any, scale: Any, values: Any, groups: Any, size: Any) -> Any:
    """`decode` to f32, which nothing rounds."""
    for group in range(groups):
        step, first = widen(scale[group]), group * size // 2
        for j in range(size // 2):
            byte = packed[first + j]
            values[2 * (first + j)] = (_low(byte) - np.float32(8)) * step
            values[2 * (first + j) + 1] = (_high(byte) - np.float32(8)) * step
    return 0


def decode_affine(packed: Any, scale: Any, bias: Any, values: Any, groups: Any, size: Any) -> Any:
    """u8 [groups, size / 2], f32 [groups] twice -> bf16 [groups, size]: an f32 product, an f32 sum, rounded once."""
    for group in range(groups):
        step, offset, first = scale[group], bias[group], group * size // 2
        for j in range(size // 2):
            byte = packed[first + j]
            values[2 * (first + j)] = round_bf16(_low(byte) * step + offset)
            values[2 * (first + j) + 1] = round_bf16(_high(byte) * step + offset)
    return 0


def other_steps(packed: Any, scale: Any, steps: Any, biases: Any, groups: Any, half: Any) -> Any:
    """Whether any of MLX's groups, bf16 steps and biases [groups], has not the values of INT4's with the same codes, u8
    [groups, half], and bf16 scales; or perhaps not the signs of zeros. A bias of -8 steps takes away what is added to codes."""
    for group in range(groups):
        step = widen(scale[group])
        if scale[group] != steps[group] or bits_of(step * np.float32(-8)) != bits_of(widen(biases[group])):
            return 1
        if scale[group] >= np.uint16(0x7C00):
            return 1  # negative, or so large that a product may be infinite
        if scale[group] == np.uint16(0):
            for j in range(group * half, group * half + half):
                if packed[j] & np.uint8(0x88) != np.uint8(0x88):
                    return 1
    return 0


@inline
def _widen_f16(f16: Any) -> Any:
    """The bits of a finite f16 -> those of an f32, exact: the multiplication mends the exponent, of subnormals too."""
    size = float_of(U(U(U(f16) & U(0x7FFF)) << U(13))) * np.float32(2.0**112)
    return U(bits_of(size) | U(U(U(f16) & U(0x8000)) << U(16)))


def wrong_q4_0(packed: Any, scale: Any, blocks: Any, rows: Any, count: Any, per_scale: Any, half: Any) -> Any:
    """Whether `count` blocks of Q4_0 in each row, an f16 and 16 bytes, have not the codes u8 [rows, count, 16] and the bf16
    scales of INT4, each of which is that of `per_scale` blocks. A block's low nibbles are its first columns; `half` is 8."""
    for row in range(rows):
        differ, place = U(0), row * (count // per_scale)
        for k in range(count // per_scale):
            step = U(U(scale[place + k]) << U(16))
            for block in range(row * count + k * per_scale, row * count + (k + 1) * per_scale):
                start = 18 * block
                f16 = U(U(blocks[start]) | U(U(blocks[start + 1]) << U(8)))
                differ = U(differ | U(_widen_f16(f16) ^ step) | U(U(f16 & U(0x7C00)) == U(0x7C00)))
                for j in range(half):
                    # Bytes j of both halves have columns 2 j, 2 j + 1, and 16 more.
                    one, two = U(packed[16 * block + j]), U(packed[16 * block + 8 + j])
                    even = U(U(one & U(15)) | U(U(two & U(15)) << U(4))) ^ U(blocks[start + 2 + 2 * j])
                    odd = U(U(one >> U(4)) | U(two & U(0xF0))) ^ U(blocks[start + 3 + 2 * j])
                    differ = U(differ | U(even) | U(odd))
        if differ:
            return 1
    return 0
