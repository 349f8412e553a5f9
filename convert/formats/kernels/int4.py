"""Four-bit codes with bf16 scales; see formats.int4."""

from __future__ import annotations

from typing import Any

import numpy as np
from kconvert.formats.kernels.bits import kernel, round_bf16, round_bits, widen


@kernel
def decode_int4(packed: Any, scale: Any, tile: Any) -> None:
    """packed u8 [groups, g/2], scale u16 [groups] of bf16 bits -> tile f32 [groups, g] = bf16((nibble - 8) * scale)."""
    for group in range(scale.shape[0]):
        step = widen(scale[group])
        for j in range(tile.shape[1] // 2):
            byte = packed[group, j]
            tile[group, 2 * j] = round_bf16(np.float32(np.int32(byte & 15) - np.int32(8)) * step)
            tile[group, 2 * j + 1] = round_bf16(np.float32(np.int32(byte >> 4) - np.int32(8)) * step)


@kernel
def encode_int4(tile: Any, divisor: Any, lowest: Any, packed: Any, scale: Any) -> None:
    """tile f32 [groups, g] -> packed u8 [groups, g/2] and scale u16 [groups] of bf16 bits.

    scale = bf16(amax / divisor), code = clamp(round_half_even(value / scale), lowest, 7), stored as code + 8; a group whose
    scale is zero has the codes 0.
    """
    for group in range(scale.shape[0]):
        amax = np.float32(0)
        for i in range(tile.shape[1]):
            amax = max(amax, abs(tile[group, i]))
        bits = round_bits(amax / divisor) >> np.uint32(16)
        scale[group] = np.uint16(bits)
        step = widen(bits) if bits else np.float32(np.inf)
        for j in range(tile.shape[1] // 2):
            low = min(max(np.rint(tile[group, 2 * j] / step), lowest), np.float32(7))
            high = min(max(np.rint(tile[group, 2 * j + 1] / step), lowest), np.float32(7))
            packed[group, j] = np.uint8(np.int32(low) + 8) | np.uint8((np.int32(high) + 8) << 4)
