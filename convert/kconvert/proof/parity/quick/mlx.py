"""MLX's affine integers of four bits as its operators decode them: f32 product, f32 sum, rounded to bf16."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import look_up, piece_rows, take

if TYPE_CHECKING:
    import torch


def decode(
    words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, cols: int, buffers: Buffers
) -> torch.Tensor:
    """U32 [rows, cols / 8], f32 [rows, groups] twice -> bf16 [rows, cols] in memory of `buffers`."""
    import torch

    rows, groups = scales.shape
    values = take(buffers, "values", torch.bfloat16, (rows, cols))
    size = cols // groups
    count = piece_rows(size)
    floats = take(buffers, "floats", torch.float32, (count, size))
    steps, offsets = (torch.split(each.view(-1, 1), count) for each in (scales, biases))
    targets = torch.split(values.view(-1, size), count)
    codes = look_up(_four_nibbles(), words.contiguous().view(torch.uint16), count * size // 4, buffers)
    for four, step, offset, target in zip(codes, steps, offsets, targets, strict=True):
        wide = floats[: len(target)].copy_(four.view(torch.bfloat16).view(target.shape))
        target.copy_(wide.mul_(step).add_(offset))
    return values


@cache
def _four_nibbles() -> torch.Tensor:
    """int64 [2^16]: the bits of four bf16, by two bytes of codes from 0 to 15."""
    import torch

    pairs = torch.arange(1 << 16)
    codes = torch.stack([pairs >> shift & 15 for shift in (0, 4, 8, 12)], 1)
    return codes.bfloat16().view(torch.int64).view(-1)
