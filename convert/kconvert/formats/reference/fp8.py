"""e4m3 codes with a scale for each block of rows and columns; see formats.fp8 for the format."""

from __future__ import annotations

import torch

from kconvert.formats.conventions import FP8_DIVISORS, LARGEST_ERROR

LARGEST = 448.0


def decode(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float8_e4m3fn [rows, cols], scale [row blocks, col blocks] -> bf16 [rows, cols].

    bf16(f32(code) * f32(scale)): the product is rounded to f32, then to bf16.
    """
    return (codes.float() * _spread(scale.float(), block, codes.shape)).bfloat16()


def encode(
    weight: torch.Tensor,
    block: tuple[int, int],
    scale_dtype: torch.dtype = torch.float32,
    mse: bool = False,
    powers: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [rows, cols] -> (float8_e4m3fn [rows, cols], scale [row blocks, col blocks] in `scale_dtype`).

    scale = amax / 448 in f32, rounded to scale_dtype, 1 where that is 0; code = e4m3(f32(value) / f32(scale)) with values
    over 448 saturated, rounded half to even. `mse`: of amax over FP8_DIVISORS, the first with the least squared error.
    `powers`: the scale is power_scale of amax; in uint8 it is written as its exponent + 127.
    """
    values = blocks_of(weight.float(), block)
    amax = values.abs().amax((1, 3), keepdim=True)
    scale = power_scale(amax) if powers else rule_scale(amax, LARGEST, scale_dtype)
    if mse:
        scale = _search(values, amax, scale)
    codes = _codes(values, scale).flatten(2).flatten(0, 1)
    return codes[: weight.shape[0], : weight.shape[1]], store(scale[:, 0, :, 0], scale_dtype)


def encode_by_scale(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16 [rows, cols] and one f32 -> float8_e4m3fn [rows, cols]: e4m3(f32(value) / scale), saturated."""
    return (weight.float() / scale.float()).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _search(values: torch.Tensor, amax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of amax over FP8_DIVISORS, the first scale of a block with the least squared error."""
    least = torch.full(amax.shape, 2**62)
    for divisor in FP8_DIVISORS:
        other = rule_scale(amax, divisor, scale.dtype)
        served = (_codes(values, other).float() * other.float()).bfloat16().float()
        error = _squared_error(values - served, amax)
        scale, least = torch.where(error < least, other, scale), torch.minimum(error, least)
    return scale


def rule_scale(amax: torch.Tensor, divisor: float, dtype: torch.dtype) -> torch.Tensor:
    """f32 amax -> scales of the same shape in `dtype`."""
    scale = (amax / divisor).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def power_scale(amax: torch.Tensor) -> torch.Tensor:
    """f32 amax -> f32, the smallest power of two that is not less than amax / 448, 2 ** -127 at least; 1 for 0."""
    mantissa, exponent = torch.frexp(amax.double() / LARGEST)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-127)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent).float()
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def store(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in `dtype`; powers of two as exponent + 127 in uint8."""
    return (scale.double().log2() + 127).to(dtype) if dtype == torch.uint8 else scale.to(dtype)


def _codes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale.float()).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _squared_error(error: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """f32 errors in blocks -> int64 for each; as reference.packed.squared_error, with 22 places."""
    _, exponent = torch.frexp(amax.double())
    unit = torch.pow(2.0, 1.0 - exponent.clamp(min=-126).double()).float()
    error = (error * unit).abs().clamp(max=LARGEST_ERROR)
    return (error * error * 2.0**22).to(torch.int32).long().sum((1, 3), keepdim=True)


def blocks_of(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[rows, cols] -> [row blocks, block rows, col blocks, block cols], filled up with zeros."""
    rows, cols = values.shape
    if rows % block[0] or cols % block[1]:
        values = torch.nn.functional.pad(values, (0, -cols % block[1], 0, -rows % block[0]))
    return values.view(-(-rows // block[0]), block[0], -(-cols // block[1]), block[1])


def _spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for each block [row blocks, col blocks] -> for each element [rows, cols]."""
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]
