"""MLX's affine integers; see formats.engines.mlx."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from kconvert.formats.kernels.bits import address, kernel, round_bf16, widen_scale


@kernel
def decode_affine(codes: Any, scales: Any, biases: Any, tile: Any) -> None:
    """codes u8 [rows, n], scales and biases [rows, groups] -> tile f32 [rows, groups, g] = bf16(code * scale + bias)."""
    rows, groups, size = tile.shape
    for row in range(rows):
        line = carray(address(codes[row]), (groups, size), np.uint8)
        for group in range(groups):
            scale, bias = widen_scale(scales[row, group]), widen_scale(biases[row, group])
            for i in range(size):
                tile[row, group, i] = round_bf16(np.float32(np.int32(line[group, i])) * scale + bias)
