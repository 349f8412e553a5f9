"""e4m3 with a scale for each block of rows and columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.proof.parity.quick.loops.bits import U, round_bf16, round_e4m3, widen, widen_e4m3


def decode(
    codes: Any, steps: Any, values: Any, rows: Any, cols: Any, height: Any, width: Any, down: Any, across: Any
) -> Any:
    """e4m3 u8 [rows, cols], f32 [down, across], one for each [height, width] -> bf16: f32 products, rounded once."""
    for block in range(down):
        for row in range(block * height, min(rows, block * height + height)):
            for k in range(across):
                step = steps[block * across + k]
                for i in range(row * cols + k * width, row * cols + min(cols, k * width + width)):
                    values[i] = round_bf16(widen_e4m3(codes[i]) * step)
    return 0


def wrong_codes(
    values: Any, steps: Any, codes: Any, rows: Any, cols: Any, height: Any, width: Any, down: Any, across: Any
) -> Any:
    """Whether any of the e4m3 u8 [rows, cols] is not the nearest to bf16 value / f32 step, an f32 quotient."""
    for block in range(down):
        for row in range(block * height, min(rows, block * height + height)):
            differ = U(0)
            for k in range(across):
                step = steps[block * across + k]
                for i in range(row * cols + k * width, row * cols + min(cols, k * width + width)):
                    differ = U(differ | U(np.uint8(round_e4m3(widen(values[i]) / step) ^ codes[i])))
            if differ:
                return 1
    return 0


def largest(
    values: Any, sizes: Any, rows: Any, cols: Any, height: Any, width: Any, down: Any, across: Any
) -> Any:
    """The largest magnitude in each block [height, width] of bf16 [rows, cols] -> bf16 [down, across]."""
    for block in range(down):
        for k in range(across):
            sizes[block * across + k] = np.uint16(0)
        for row in range(block * height, min(rows, block * height + height)):
            for k in range(across):
                size = np.uint16(0)
                for i in range(row * cols + k * width, row * cols + min(cols, k * width + width)):
                    size = max(size, np.uint16(values[i] & np.uint16(0x7FFF)))
                sizes[block * across + k] = max(sizes[block * across + k], size)
    return 0
