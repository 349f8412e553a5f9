"""e4m3 codes with a scale for each block of rows and columns; see formats.fp8 for the format."""

from __future__ import annotations

import torch

from kconvert.formats.conventions import FP8_DIVISORS, LARGEST_ERROR

LARGEST = 448.0


def decode(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float8_e4m3fn [rows, cols], scale [row blocks, col blocks] -> bf16 [rows, cols].

    bf16(f32(code) * f32(scale)): the product is rounded to f32, then to bf16.
    """
    return (codes.float() * spread(scale.float(), block, codes.shape)).bfloat16()


def encode(
    weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32, mse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [rows, cols] -> (float8_e4m3fn [rows, cols], scale [row blocks, col blocks] in `scale_dtype`).

    scale = amax / 448 in f32, rounded to scale_dtype, 1 where that is 0; code = e4m3(f32(value) / f32(scale)) with values
    over 448 saturated, rounded half to even. `mse`: of amax over FP8_DIVISORS, the first with the least squared error.
    """
    values = weight.float()
    amax = blocks_of(values.abs(), block).amax((1, 3))
    scale = _scale(amax, LARGEST, scale_dtype)
    if not mse:
        return _codes(values, scale, block), scale
    least = torch.full(amax.shape, 2**62)
    for divisor in FP8_DIVISORS:
        other = _scale(amax, divisor, scale_dtype)
        served = decode(_codes(values, other, block), other, block).float()
        error = _squared_error(values - served, amax, block)
        scale, least = torch.where(error < least, other, scale), torch.minimum(error, least)
    return _codes(values, scale, block), scale


def _scale(amax: torch.Tensor, divisor: float, dtype: torch.dtype) -> torch.Tensor:
    scale = (amax / divisor).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _codes(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    quotients = values / spread(scale.float(), block, values.shape)
    return quotients.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _squared_error(error: torch.Tensor, amax: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """f32 errors [rows, cols] -> int64 [row blocks, col blocks]; as reference.packed.squared_error, with 22 places."""
    _, exponent = torch.frexp(amax.double())
    unit = torch.pow(2.0, 1.0 - exponent.clamp(min=-126).double()).float()
    error = (error * spread(unit, block, error.shape)).abs().clamp(max=LARGEST_ERROR)
    return blocks_of((error * error * 2.0**22).to(torch.int32).long(), block).sum((1, 3))


def blocks_of(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[rows, cols] -> [row blocks, block rows, col blocks, block cols], filled up with zeros."""
    rows, cols = values.shape
    padded = torch.nn.functional.pad(values, (0, -cols % block[1], 0, -rows % block[0]))
    return padded.view(-(-rows // block[0]), block[0], -(-cols // block[1]), block[1])


def spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for each block [row blocks, col blocks] -> for each element [rows, cols]."""
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]
