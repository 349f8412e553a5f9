"""Kept memory as tensors, pieces of a weight that fit into a core's cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers

if TYPE_CHECKING:
    import torch

PIECE_ELEMENTS = 1 << 17  # of less, Python would take as much time as torch


def take(buffers: Buffers, use: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in the memory for `use`, with whatever is there."""
    import torch

    room = buffers.take(use, math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(room).view(dtype).view(shape)


def piece_rows(cols: int, height: int = 0) -> int:
    """How many rows of so many columns fit into a cache; of a block of `height` rows, a number that divides it."""
    most = max(1, PIECE_ELEMENTS // max(cols, 1))
    return next(count for count in range(min(most, height), 0, -1) if height % count == 0) if height else most


def largest(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """bf16 [rows, cols] -> the largest magnitude in each block [height, width], bf16.

    Its bits are the larger of the largest as a signed integer, which is positive, and the largest as an unsigned one, which is
    negative if any is, without its sign.
    """
    import numpy as np
    import torch

    rows, cols = values.shape
    signed = values.view(torch.int16).numpy()
    unsigned = signed.view(np.uint16)
    if height > 1:
        signed, unsigned = (bits.reshape(rows // height, height, cols).max(1) for bits in (signed, unsigned))
    signed, unsigned = (bits.reshape(len(bits), cols // width, width).max(-1) for bits in (signed, unsigned))
    return torch.from_numpy(np.maximum(signed, (unsigned & 0x7FFF).view(np.int16))).view(torch.bfloat16)
