"""Microscaling floats; see formats.mx."""

from __future__ import annotations

import torch

from kconvert.formats.reference.packed import squared_error

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """u8 [rows, cols / 2], low nibble first -> f32 values [rows, cols]; nibble 8 is -0."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    return table[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """f32 or bf16 -> u8 codes of the nearest e2m1, half to even, saturating; zeros of either sign become +0."""
    table = torch.tensor(E2M1, device=values.device)
    between = (table[1:] + table[:-1]) / 2
    magnitudes = values.abs().float().contiguous()
    # Ties go to the even code: at or above an odd code's lower bound it must be above, at an even one's at suffices.
    above = torch.searchsorted(between, magnitudes, right=False)
    ties = torch.isin(magnitudes, between) & (above % 2 == 1)
    return ((above + ties) | ((values < 0).long() << 3)).to(torch.uint8)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes u8 [rows, cols / 2] of e2m1 or float8_e4m3fn [rows, cols], scale u8 [rows, cols / 32] -> bf16 [rows, cols].

    bf16(f32(code) * 2 ** (scale - 127)): exact before the rounding.
    """
    values = unpack_e2m1(codes) if codes.dtype == torch.uint8 else codes.float()
    step = torch.pow(2.0, scale.double() - 127).float().unsqueeze(-1)
    return (values.view(*scale.shape, -1) * step).flatten(-2).bfloat16()


def encode(
    weight: torch.Tensor, bits: int, mse: bool = False, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16, f16 or f32 [rows, cols] -> (u8 packed e2m1 or float8_e4m3fn codes, scale u8 [rows, cols / 32]).

    The scale's exponent is that of amax, one more from a mantissa of 1.75 (but 127 at most), less 2 or 8. Codes are those
    of the quotient value / scale, an f32. `mse`: of that exponent, one less and one more, the first with the least error.
    `exact`: in groups all of whose values come back, zeros keep their sign; of e4m3 half of the scale counts where only that
    brings them back.
    """
    groups = weight.view(len(weight), -1, 32)
    mantissa, exponent = torch.frexp(groups.abs().amax(-1).double())  # mantissa in [0.5, 1), 0 for 0
    power = exponent - 1 + (mantissa >= 0.875).int()
    power = torch.where(mantissa == 0, torch.full_like(power, -200), power)
    largest = 2 if bits == 4 else 8
    scale = (power.clamp(max=127) - largest).clamp(min=-127)
    if exact:
        half = (scale - 1).clamp(min=-127)
        only_half = ~_come_back(weight, scale, bits) & _come_back(weight, half, bits)
        scale = torch.where(only_half, half, scale)
        return _quantise(weight, scale, bits, _come_back(weight, scale, bits))
    best = _quantise(weight, scale, bits)
    if not mse:
        return best
    least = squared_error(groups.float(), decode(*best).float().view(groups.shape))
    rule = scale
    for other in (rule - 1, rule + 1):
        served = decode(*_quantise(weight, other.clamp(-127, 127 - largest), bits)).float().view(groups.shape)
        error = squared_error(groups.float(), served)
        better = (error < least) & (other >= -127) & (other <= 127 - largest)
        scale, least = torch.where(better, other, scale), torch.where(better, error, least)
    return _quantise(weight, scale, bits)


def _come_back(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """bool [rows, cols / 32]: whether every value of a group is that of a code under this scale, 0 and -0 being one."""
    groups = weight.view(*scale.shape, 32)
    return (decode(*_quantise(weight, scale, bits)).view(groups.shape) == groups).all(-1)


def _quantise(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, keeps: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, cols] and exponents int32 [rows, cols / 32] -> codes and biased scale, as encode; with the sign of zeros in
    groups of `keeps`."""
    groups = weight.view(*scale.shape, 32)
    quotient = (groups.double() / torch.pow(2.0, scale.double()).unsqueeze(-1)).float().flatten(-2)
    stored = (scale + 127).to(torch.uint8)
    if bits == 8:
        return quotient.clamp(-448, 448).to(torch.float8_e4m3fn), stored
    codes = round_e2m1(quotient)
    if keeps is not None:
        signs = torch.signbit(groups) & keeps.unsqueeze(-1)
        codes = codes | (signs.flatten(-2).to(torch.uint8) << 3)
    return codes[:, ::2] | (codes[:, 1::2] << 4), stored
