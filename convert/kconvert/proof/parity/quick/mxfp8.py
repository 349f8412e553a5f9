"""MXFP8: f32 codes times powers of two rounded to bf16, and whether they are as the reference encodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

DECODE = Loop("mxfp8", "decode", "u1* u1* u2* f4* i8 i8 i8")
WRONG = Loop("mxfp8", "wrong", "u2* u1* u1* f4* i8 i8 i8 i8")


def decode(codes: torch.Tensor, scale: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """u8 [rows, cols] of e4m3, u8 exponents [rows, groups] -> bf16 [rows, cols] in memory of `buffers`."""
    import torch

    values = take(buffers, "values", torch.bfloat16, tuple(codes.shape))
    DECODE(codes.contiguous(), scale.contiguous(), values, *_groups(codes, scale))
    return values


def is_made_of(values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether finite bf16 [rows, cols] become these codes and u8 exponents by one of the ways."""
    tensors = values, codes.contiguous(), scale.contiguous(), *_groups(codes, scale)
    return any(not WRONG(*tensors, exact) for exact in (False, True))


def _groups(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Room for a row, the rows, and of each the groups and their columns."""
    import torch

    rows, groups = scale.shape
    cols = codes.shape[1]
    return torch.empty(cols), rows, groups, cols // max(groups, 1)
