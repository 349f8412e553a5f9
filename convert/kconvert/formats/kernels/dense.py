"""BF16 to f32 and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import kernel, round_bits, widen

SQUARE = 64


@kernel
def decode_bf16(bits: Any, tile: Any) -> None:
    """bits u16 [n] of bf16 -> tile f32 [n], exact."""
    for i in range(tile.shape[0]):
        tile[i] = widen(bits[i])


@kernel
def encode_bf16(tile: Any, out: Any) -> None:
    """tile f32 [n] -> out u16 [n], the bits of the nearest bf16, half to even."""
    for i in range(tile.shape[0]):
        out[i] = np.uint16(round_bits(tile[i]) >> np.uint32(16))


@kernel
def encode_transposed(matrices: Any, out: Any) -> None:
    """matrices f32 [n, rows, cols] -> out u16 [n, cols, rows], as encode_bf16; square by square, which stay in the cache."""
    count, rows, cols = matrices.shape
    for n in range(count):
        for first_row in range(0, rows, SQUARE):
            for first_col in range(0, cols, SQUARE):
                for col in range(first_col, min(first_col + SQUARE, cols)):
                    for row in range(first_row, min(first_row + SQUARE, rows)):
                        out[n, col, row] = np.uint16(round_bits(matrices[n, row, col]) >> np.uint32(16))
