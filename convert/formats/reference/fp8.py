"""e4m3 codes with a scale for each block of rows and columns; see formats.fp8 for the format."""

from __future__ import annotations

import torch

LARGEST = 448.0


def decode(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float8_e4m3fn [rows, cols], scale [row blocks, col blocks] -> bf16 [rows, cols].

    bf16(f32(code) * f32(scale)): the product is rounded to f32, then to bf16.
    """
    return (codes.float() * spread(scale.float(), block, codes.shape)).bfloat16()


def encode(
    weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [rows, cols] -> (float8_e4m3fn [rows, cols], scale [row blocks, col blocks] in `scale_dtype`).

    scale = amax / 448 in f32, rounded to scale_dtype, 1 where that is 0; code = e4m3(f32(value) / f32(scale)) with values
    over 448 saturated, rounded half to even.
    """
    values = weight.float()
    scale = (block_amax(values, block) / LARGEST).to(scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    quotients = values / spread(scale.float(), block, values.shape)
    return quotients.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def block_amax(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """f32 [rows, cols] -> the largest |value| of each block [row blocks, col blocks]; the last blocks may be short."""
    rows, cols = values.shape
    padded = torch.nn.functional.pad(values.abs(), (0, -cols % block[1], 0, -rows % block[0]))
    return padded.view(-(-rows // block[0]), block[0], -(-cols // block[1]), block[1]).amax((1, 3))


def spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for each block [row blocks, col blocks] -> for each element [rows, cols]."""
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]
