"""BF16 to f32 and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import kernel, round_bits, widen


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
