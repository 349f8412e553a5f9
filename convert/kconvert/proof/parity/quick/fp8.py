"""FP8 as compressed-tensors decodes it, f32 codes times f32 scales rounded to bf16, and whether it is as the reference
encodes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats.conventions import FP8_DIVISORS
from kconvert.proof.parity.metrics import same_bits
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

DECODE = Loop("fp8", "decode", "u1* f4* u2* i8 i8 i8 i8 i8 i8")
LARGEST = Loop("fp8", "largest", "u2* u2* i8 i8 i8 i8 i8 i8")
WRONG = Loop("fp8", "wrong_codes", "u2* f4* u1* i8 i8 i8 i8 i8 i8")
BEST = Loop("fp8", "best_steps", "u2* u2* f4* f4* u4* i8 i8 i8 i8 i8 i8 i8 i8")
COUNTERS = 13 * 128  # magnitudes of 13 binades


def decode(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, buffers: Buffers) -> torch.Tensor:
    """F8_E4M3 [rows, cols] -> bf16 in memory of `buffers`; a scale for each `block`, else for each row or for all."""
    import torch

    values = take(buffers, "values", torch.bfloat16, tuple(codes.shape))
    DECODE(codes.contiguous(), scale.float().contiguous(), values, *_grid(codes.shape, scale, block))
    return values


def is_made_of(
    values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, powers: bool
) -> bool:
    """Whether finite bf16 [rows, cols] become these codes and scales, one for each block, else for each row, by the usual rule
    or of least squared error; or by powers of two."""
    import torch

    from kconvert.formats.reference.fp8 import LARGEST, power_scale, rule_scale, store

    height, width = block or (1, values.shape[1])
    sizes = largest(values, height, width)
    amax = sizes.float()
    wanted = power_scale(amax) if powers else rule_scale(amax, LARGEST, scale.dtype)
    if not powers and not same_bits(wanted.view_as(scale), scale):
        steps = torch.stack([rule_scale(amax, divisor, scale.dtype).float() for divisor in FP8_DIVISORS])
        wanted = _best(values, sizes, steps, height, width).to(scale.dtype)
    if not same_bits(store(wanted, scale.dtype).view_as(scale), scale):
        return False
    grid = *values.shape, height, width, *sizes.shape
    return not WRONG(values, wanted.float().contiguous(), codes.contiguous().view(torch.uint8), *grid)


def _best(values: torch.Tensor, sizes: torch.Tensor, steps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Of f32 steps [choices, down, across], the first that has the least squared error on each block -> f32 [down, across]."""
    import torch

    best, room = torch.empty(sizes.shape), torch.empty(4, COUNTERS, dtype=torch.int32)
    BEST(values, sizes, steps, best, room, *values.shape, height, width, *sizes.shape, len(steps), COUNTERS)
    return best


def largest(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """bf16 [rows, cols] -> the largest magnitude in each block [height, width], bf16. By bits: NaN is above all."""
    import torch

    rows, cols = values.shape
    sizes = torch.empty(math.ceil(rows / height), math.ceil(cols / width), dtype=torch.bfloat16)
    LARGEST(values, sizes, rows, cols, height, width, *sizes.shape)
    return sizes


def _grid(shape: torch.Size, scale: torch.Tensor, block: tuple[int, int] | None) -> tuple[int, ...]:
    """Rows, columns, and of the blocks with a scale the height, the width, and how many there are down and across."""
    rows, cols = shape
    height, width = block or ((1, cols) if scale.numel() == rows else (max(rows, 1), cols))
    return rows, cols, height, width, math.ceil(rows / height), math.ceil(cols / max(width, 1))
