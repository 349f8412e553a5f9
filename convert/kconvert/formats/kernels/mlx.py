"""MLX's affine integers; see formats.engines.mlx."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import (
    INFINITE,
    MAGNITUDE,
    bits_of,
    inline,
    kernel,
    round_bf16,
    store_bf16,
    widen,
    widen_scale,
)


@kernel
def decode_affine(codes: Any, scales: Any, biases: Any, tile: Any) -> None:
    """codes u8 [rows, n], scales and biases [rows, groups] -> tile f32 [rows, groups, g] = bf16(code * scale + bias)."""
    rows, groups, size = tile.shape
    for row in range(rows):
        line = codes[row, : groups * size].reshape(groups, size)
        for group in range(groups):
            scale, bias = widen_scale(scales[row, group]), widen_scale(biases[row, group])
            for i in range(size):
                tile[row, group, i] = round_bf16(np.float32(np.int32(line[group, i])) * scale + bias)


@inline
def _loses_signs(codes: Any, bits: Any, step: Any) -> Any:
    """Whether a code of a group times a scale that is zero or negative is -0: with a bias it is +0."""
    half, mask = np.int32(1 << (bits - 1)), np.int32((1 << bits) - 1)
    for byte in codes:
        for place in range(0, 8, bits):
            number = ((np.int32(byte) >> np.int32(place)) & mask) - half
            if bits_of(np.float32(number) * step) == np.uint32(0x80000000):
                return 1
    return 0


@kernel
def make_biases(codes: Any, steps: Any, bits: Any, scales: Any, biases: Any) -> Any:
    """steps, bf16 in u16 [rows, groups] -> scales, the same, and biases, -2^(bits - 1) times them, both bf16 in u16 or f32.

    Returns how many groups have codes of `codes` u8 [rows, n] whose zeros lose their sign; -1 if a scale is too large.
    """
    rows, groups = steps.shape
    half = np.float32(1 << (bits - 1))
    size = codes.shape[1] // max(groups, 1)
    lost = 0
    for row in range(rows):
        for group in range(groups):
            step = widen(steps[row, group])
            store_bf16(scales, row, group, step)
            store_bf16(biases, row, group, -half * step)
            if np.uint32(bits_of(step * half * np.float32(2)) & MAGNITUDE) >= INFINITE:
                return -1
            if np.uint32(bits_of(step) - np.uint32(1)) >= MAGNITUDE:  # zero, or negative
                lost += _loses_signs(codes[row, group * size : (group + 1) * size], bits, step)
    return lost
