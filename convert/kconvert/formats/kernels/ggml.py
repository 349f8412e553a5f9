"""ggml's blocks of 32 values; see formats.engines.ggml."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import kernel

HALF = np.float32(0.5)
WIDEST_CODE = np.float32(127)


@kernel
def regroup(codes: Any, head: Any, blocks: Any) -> Any:
    """Four-bit codes u8 [n, 16], the first value in the low nibble -> blocks u8 [n, head + 16], behind their scales.

    There byte j has value j in its low and value j + 16 in its high nibble.
    """
    for block in range(codes.shape[0]):
        for j in range(8):
            first, second = codes[block, j], codes[block, j + 8]
            blocks[block, head + 2 * j] = (first & 15) | np.uint8(second << 4)
            blocks[block, head + 2 * j + 1] = (first >> 4) | (second & 0xF0)


@kernel
def decode_nibbles(blocks: Any, head: Any, values: Any, scale: Any, tile: Any) -> Any:
    """Blocks as `regroup` makes them, values f32 [16] of the codes, scale f32 [n] -> tile f32 [n, 32]."""
    for block in range(tile.shape[0]):
        for j in range(16):
            byte = blocks[block, head + j]
            tile[block, j] = values[byte & 15] * scale[block]
            tile[block, j + 16] = values[byte >> 4] * scale[block]


@kernel
def encode_q8_0(tile: Any, scale: Any, codes: Any) -> Any:
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
