"""Symmetric INT4 as compressed-tensors decodes it: codes times bf16 scales, rounded once or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

DECODE = Loop("integers", "decode", "u1* u2* u2* i8 i8")
MULTIPLY = Loop("integers", "multiply", "u1* u2* f4* i8 i8")
WRONG_Q4_0 = Loop("integers", "wrong_q4_0", "u1* u2* u1* i8 i8 i8 i8")
BLOCK = 32  # columns of Q4_0


def decode(
    words: torch.Tensor, scale: torch.Tensor, cols: int, buffers: Buffers, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """I32 [rows, cols / 8] and bf16 [rows, groups] -> [rows, cols] in memory of `buffers`; bf16, or f32, in which nothing
    rounds. Groups have an even number of columns."""
    import torch

    rows, groups = scale.shape
    values = take(buffers, "values", dtype or torch.bfloat16, (rows, cols))
    loop = DECODE if values.dtype == torch.bfloat16 else MULTIPLY
    loop(words.contiguous().view(torch.uint8), scale.contiguous(), values, rows * groups, cols // max(groups, 1))
    return values


def is_q4_0(words: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor) -> bool:
    """Whether U8 blocks [rows, …] have the codes I32 [rows, cols / 8] and the bf16 scales [rows, groups]."""
    import torch

    rows, groups = scale.shape
    count = words.shape[1] * 8 // BLOCK
    tensors = words.contiguous().view(torch.uint8), scale.contiguous(), blocks.contiguous()
    return not WRONG_Q4_0(*tensors, rows, count, count // max(groups, 1), 8)
