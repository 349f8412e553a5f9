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
