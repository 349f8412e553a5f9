"""FP8 as compressed-tensors decodes it, f32 codes times f32 scales rounded to bf16, and as the reference encodes it.

A table has the values of two codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import largest, look_up, piece_rows, take

if TYPE_CHECKING:
    import torch

TINY = 2.0**-100  # of scales: these are rounded finely


def decode(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, buffers: Buffers) -> torch.Tensor:
    """F8_E4M3 [rows, cols] -> bf16 in memory of `buffers`; a scale for each `block`, else for each row or for all."""
    import torch

    count = piece_rows(codes.shape[1], block[0] if block else 0)
    values = take(buffers, "values", torch.bfloat16, tuple(codes.shape))
    pairs = look_up(_two_floats(), codes.view(torch.uint16), count * codes.shape[1] // 2, buffers)
    steps = _steps(scale.float(), codes.shape, block, count)
    for two, step, target in zip(pairs, steps, torch.split(values, count), strict=True):
        target.copy_(two.view(torch.float32).view(target.shape).mul_(step))
    return values


def encode(
    values: torch.Tensor, block: tuple[int, int] | None, scale_dtype: torch.dtype, powers: bool, buffers: Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [rows, cols] of whole blocks, else with a scale for each row -> codes, in memory of `buffers`, and scales."""
    import torch

    from kconvert.formats.reference.fp8 import LARGEST, power_scale, rule_scale, store

    rows, cols = values.shape
    count = piece_rows(cols, block[0] if block else 0)
    amax = largest(values, *(block or (1, cols))).float()
    scale = power_scale(amax) if powers else rule_scale(amax, LARGEST, scale_dtype)
    # Quotients are over 448 by the rounding of a scale at most, and up to 464 become 448 all the same.
    clamps = bool((scale < TINY).any())
    codes = take(buffers, "codes", torch.float8_e4m3fn, (rows, cols))
    floats = take(buffers, "floats", torch.float32, (count, cols))
    steps = _steps(scale.float(), values.shape, block, count)
    for piece, step, target in zip(torch.split(values, count), steps, torch.split(codes, count), strict=True):
        if len(piece) < count:
            floats = floats[: len(piece)]
        quotients = floats.copy_(piece).div_(step)
        target.copy_(quotients.clamp_(-LARGEST, LARGEST) if clamps else quotients)
    return codes, store(scale, scale_dtype)


def _steps(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None, count: int) -> Iterator[torch.Tensor]:
    """The scales of each `count` rows of f32 [rows, cols] = `shape`, as they are to be broadcast: those of a row of blocks, one
    for each column, else one for each row."""
    import torch

    if block is None:
        yield from torch.split(scale.view(-1, 1).expand(shape[0], 1), count)
        return
    height, width = block
    rows = scale.unsqueeze(-1).expand(-1, -1, width).flatten(1)[:, : shape[1]]
    for first in range(0, shape[0], count):
        yield rows[first // height]


@cache
def _two_floats() -> torch.Tensor:
    """int64 [2^16]: the bits of two f32, by two bytes of e4m3 codes."""
    import torch

    codes = torch.arange(1 << 16).to(torch.uint16).view(torch.float8_e4m3fn)
    return codes.float().view(torch.int64)
