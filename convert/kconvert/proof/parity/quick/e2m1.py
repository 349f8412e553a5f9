"""MXFP4 and NVFP4: f32 codes times f32 scales rounded to bf16, and whether they are as the reference encodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

DECODE = Loop("e2m1", "decode", "u1* f4* u2* i8 i8")
WRONG_NVFP4 = Loop("e2m1", "wrong_nvfp4", "u2* u1* u1* f4* i8 i8 i8 f4 i8")
WRONG_MXFP4 = Loop("e2m1", "wrong_mxfp4", "u2* u1* u1* i8 i8 i8 i8")
EXACT, AMAX, MSE = 0, 1, 2  # as the loops call them


def decode(packed: torch.Tensor, steps: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """u8 or i8 [rows, cols / 2], f32 [rows, groups] -> bf16 [rows, cols] in memory of `buffers`."""
    import torch

    rows, groups = steps.shape
    cols = packed.shape[1] * 2
    values = take(buffers, "values", torch.bfloat16, (rows, cols))
    DECODE(packed.contiguous(), steps.contiguous(), values, rows * groups, cols // max(groups, 1))
    return values


def is_nvfp4_of(
    values: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, steps: torch.Tensor, factor: float
) -> bool:
    """Whether each group of finite bf16 [rows, cols] comes back from u8 codes and f32 steps [rows, groups], or has what the
    reference makes of it; the latter with e4m3 scales by amax, or all of least squared error."""
    rows, groups = scale.shape
    tensors = values, packed.contiguous(), scale.contiguous(), steps.contiguous()
    size = values.shape[1] // max(groups, 1)
    return any(not WRONG_NVFP4(*tensors, rows, groups, size, factor, way) for way in (AMAX, MSE))


def is_mxfp4_of(values: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether finite bf16 [rows, cols] become these codes and u8 exponents by one of the ways."""
    rows, groups = scale.shape
    tensors, size = (values, packed.contiguous(), scale.contiguous()), values.shape[1] // max(groups, 1)
    return any(not WRONG_MXFP4(*tensors, rows, groups, size, way) for way in (EXACT, AMAX, MSE))
