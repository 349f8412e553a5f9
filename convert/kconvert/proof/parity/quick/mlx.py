"""MLX's affine integers of four bits as its operators decode them: f32 product, f32 sum, rounded to bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

DECODE = Loop("integers", "decode_affine", "u1* f4* f4* u2* i8 i8")


def decode(
    words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, cols: int, buffers: Buffers
) -> torch.Tensor:
    """U32 [rows, cols / 8], f32 [rows, groups] twice -> bf16 [rows, cols] in memory of `buffers`."""
    import torch

    rows, groups = scales.shape
    values = take(buffers, "values", torch.bfloat16, (rows, cols))
    packed = words.contiguous().view(torch.uint8)
    DECODE(packed, scales.contiguous(), biases.contiguous(), values, rows * groups, cols // groups)
    return values
