"""MLX's affine integers of four bits as its operators decode them: f32 product, f32 sum, rounded to bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.metrics import same_bits
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

DECODE = Loop("integers", "decode_affine", "u1* f4* f4* u2* i8 i8")
OTHER_STEPS = Loop("integers", "other_steps", "u1* u2* u2* u2* i8 i8")


def is_int4(
    words: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor, biases: torch.Tensor
) -> bool:
    """Whether I32 words and bf16 scales [rows, groups] of symmetric INT4 have the values, with signs of zeros, of U32 codes and
    steps and biases in groups of as many columns; False also where only the values tell."""
    import torch

    if {scale.dtype, steps.dtype, biases.dtype} != {torch.bfloat16} or not scale.numel():
        return False
    packed = words.contiguous().view(torch.uint8)
    floats = scale.contiguous(), steps.contiguous(), biases.contiguous()
    half = packed.numel() // scale.numel()
    return same_bits(packed, codes.view(torch.uint8)) and not OTHER_STEPS(packed, *floats, scale.numel(), half)


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
