"""Symmetric INT4 as compressed-tensors decodes it: bf16 codes times bf16 scales. A table has the values of two bytes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import look_up, piece_rows, take

if TYPE_CHECKING:
    import torch


def decode(words: torch.Tensor, scale: torch.Tensor, cols: int, buffers: Buffers) -> torch.Tensor:
    """I32 [rows, cols / 8] and bf16 [rows, groups] -> bf16 [rows, cols] in memory of `buffers`."""
    import torch

    rows, groups = scale.shape
    values = take(buffers, "values", torch.bfloat16, (rows, cols))
    count = piece_rows(cols)
    codes = look_up(_four_nibbles(), words.view(torch.uint16), count, buffers)
    steps = torch.split(scale.unsqueeze(-1), count)
    targets = torch.split(values.view(rows, groups, -1), count)
    for four, step, target in zip(codes, steps, targets, strict=True):
        torch.mul(four.view(torch.bfloat16).view(target.shape), step, out=target)
    return values


@cache
def _four_nibbles() -> torch.Tensor:
    """int64 [2^16]: the bits of four bf16, by two bytes of INT4 codes."""
    import torch

    pairs = torch.arange(1 << 16)
    codes = torch.stack([(pairs >> shift & 15) - 8 for shift in (0, 4, 8, 12)], 1)
    return codes.bfloat16().view(torch.int64).view(-1)
