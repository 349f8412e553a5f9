"""NVFP4; see formats.nvfp4."""

from __future__ import annotations

import torch

from kconvert.formats.conventions import NVFP4_STEPS
from kconvert.formats.reference.mx import E2M1, round_e2m1, unpack_e2m1
from kconvert.formats.reference.packed import squared_error

GROUP = 16


def decode(
    packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, multiplies: bool = False
) -> torch.Tensor:
    """u8 [rows, cols / 2], float8_e4m3fn [rows, cols / 16], f32 -> bf16 [rows, cols] = bf16(code * step).

    step = scale / global scale, or scale * global scale.
    """
    step = scale.float() * global_scale.float() if multiplies else scale.float() / global_scale.float()
    return (unpack_e2m1(packed).view(*scale.shape, -1) * step.unsqueeze(-1)).flatten(-2).bfloat16()


def global_factor(reach: float) -> float:
    """The power of two that a weight whose largest magnitude is `reach` has: 2^(e - 10) of 2^e in it, 1 for 0."""
    _, exponent = torch.frexp(torch.tensor(reach, dtype=torch.float64))
    return float(2.0 ** max(-126, min(126, int(exponent) - 11))) if reach else 1.0


def encode(weight: torch.Tensor, factor: float, mse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16, f16 or f32 [rows, cols] and the global factor, a power of two -> (u8 packed e2m1, float8_e4m3fn scale).

    scale = e4m3(amax / (6 * factor)), 2^-9 at least; code = e2m1(value / (scale * factor)), f32 divisions. `mse`: of that scale
    and those NVFP4_STEPS from it, the first with the least error.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    amax = groups.abs().amax(-1)
    rule = (amax / (6 * torch.tensor(factor))).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).clamp(min=1)
    scale = rule
    if mse:
        least = squared_error(groups, _served(groups, rule, factor))
        for step in NVFP4_STEPS:
            other = rule.int() + step
            sound = (other >= 1) & (other <= 0x7E)
            candidate = other.clamp(1, 0x7E).to(torch.uint8)
            error = squared_error(groups, _served(groups, candidate, factor))
            better = (error < least) & sound
            scale, least = torch.where(better, candidate, scale), torch.where(better, error, least)
    codes = _codes(groups, scale, factor).flatten(-2)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scale.view(torch.float8_e4m3fn)


def _step(scale: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """e4m3 bits -> f32, one step for 16 columns."""
    return (scale.view(torch.float8_e4m3fn).float() * factor).unsqueeze(-1)


def _codes(groups: torch.Tensor, scale: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    return round_e2m1(groups / _step(scale, factor))


def _served(groups: torch.Tensor, scale: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """The values that come back, f32."""
    codes = _codes(groups, scale, factor)
    values = unpack_e2m1((codes[..., ::2] | (codes[..., 1::2] << 4)).contiguous())
    return (values * _step(scale, factor)).bfloat16().float()


def comes_back(
    weight: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, multiplies: bool
) -> torch.Tensor:
    """bool [rows, cols / 16]: whether these codes and scales give a group's values back, with the signs of zeros."""
    served = decode(packed, scale, global_scale, multiplies)
    same = (served == weight) & (torch.signbit(served) == torch.signbit(weight))
    return same.view(*scale.shape, GROUP).all(-1)


def fake_quantise(weight: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """f32 [n, rows, cols] of bf16 values and the largest magnitudes [n], which make the factors -> bf16, as it comes back.

    Groups that codes and a scale reproduce stay, with the signs of zeros; others go by `encode`.
    """
    factor = torch.tensor([global_factor(float(value)) for value in reach], device=weight.device).view(-1, 1, 1)
    groups = weight.view(*weight.shape[:-1], -1, GROUP)
    amax = groups.abs().amax(-1)
    rule = (amax / (6 * factor)).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).clamp(min=1)
    served = _served(groups, rule, factor)
    kept = amax == 0
    for code in E2M1[1:]:
        wanted = amax / (code * factor)
        scale = wanted.clamp(max=448).to(torch.float8_e4m3fn)
        sound = (scale.float() == wanted) & (scale.float() > 0)
        come_back = _served(groups, torch.where(sound, scale.view(torch.uint8), 1), factor)
        kept |= sound & (come_back == groups).all(-1)
    return torch.where(kept.unsqueeze(-1), groups, served).flatten(-2).bfloat16()
