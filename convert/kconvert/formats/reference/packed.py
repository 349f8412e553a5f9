"""Packed integer codes with a scale for each group; see formats.packed for the format, formats.conventions for the rules."""

from __future__ import annotations

from dataclasses import replace

import torch

from kconvert.formats.conventions import DIVISORS, LARGEST_ERROR, Convention

HEAD = 8  # values of a group that a scale is tried on first


def unpack(packed: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """I32 [rows, ceil(cols * bits / 32)] -> int16 codes [rows, cols] in [-2^(bits-1), 2^(bits-1)); low bits are first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    stored = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    codes: torch.Tensor = stored.flatten(-2)[..., :cols] - 2 ** (bits - 1)
    return codes.to(torch.int16)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, cols] -> I32 [rows, ceil(cols * bits / 32)]; what is past the last column is 0."""
    rows, cols = codes.shape
    in_word = 32 // bits
    stored = torch.zeros(rows, -(-cols // in_word) * in_word, dtype=torch.int64, device=codes.device)
    stored[:, :cols] = codes.to(torch.int64) + 2 ** (bits - 1)
    words = (stored.view(rows, -1, in_word) << torch.arange(0, 32, bits, device=codes.device)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def decode(
    packed: torch.Tensor,
    scale: torch.Tensor,
    cols: int,
    bits: int = 4,
    zero_point: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes and scales [rows, groups] -> [rows, cols] = (code - zero point) * scale, rounded once to the scale's dtype.

    `zero_point` I32 [ceil(rows * bits / 32), groups] is packed down the rows; `g_idx` [cols] is the group of each column.
    """
    rows, groups = scale.shape
    if g_idx is None:
        g_idx = torch.arange(cols, device=packed.device) // (cols // groups)
    codes = unpack(packed, bits, cols).float()
    if zero_point is not None:
        codes -= unpack(zero_point.T, bits, rows).T.float()[:, g_idx]
    return (codes * scale.float()[:, g_idx]).to(scale.dtype)


def encode(weight: torch.Tensor, group_size: int, rule: Convention) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [rows, cols] -> (I32 packed, bf16 scale [rows, cols / group_size]).

    scale = bf16(f32(amax) / divisor), or the convention's own where that is zero; code = clamp(round_half_even(quotient),
    lowest, 7), the quotient f32(value) / f32(scale) rounded to bf16 first if the convention says so.
    """
    groups = weight.float().view(len(weight), -1, group_size)
    scale = rule_scale(groups, rule)
    return pack(quantise(groups, scale, rule).flatten(-2), 4), scale


def rule_scale(groups: torch.Tensor, rule: Convention) -> torch.Tensor:
    """f32 [..., g] -> bf16 [...]."""
    scale = (groups.abs().amax(-1) / rule.divisor).bfloat16()
    return torch.where(scale == 0, torch.tensor(rule.zero_scale).bfloat16(), scale)


def quantise(groups: torch.Tensor, scale: torch.Tensor, rule: Convention) -> torch.Tensor:
    """f32 [..., g] and bf16 scale [...] -> f32 codes [..., g]; all zero where the scale is."""
    return unclamped(groups, scale, rule).clamp(rule.lowest, rule.highest)


def unclamped(groups: torch.Tensor, scale: torch.Tensor, rule: Convention) -> torch.Tensor:
    """The codes of quantise before they are clamped."""
    step = scale.float().unsqueeze(-1)
    quotient = groups / torch.where(step == 0, torch.inf, step)
    return torch.round(quotient.bfloat16().float() if rule.rounds else quotient)


def encode_mse(weight: torch.Tensor, group_size: int, rule: Convention) -> tuple[torch.Tensor, torch.Tensor]:
    """encode, but of amax / divisor for the rule's divisor and DIVISORS, the first scale with the least squared error."""
    groups = weight.float().view(len(weight), -1, group_size)
    best = rule_scale(groups, rule)
    least = _error(groups, best, rule)
    for divisor in DIVISORS:
        scale = rule_scale(groups, replace(rule, divisor=divisor))
        error = _error(groups, scale, rule)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return pack(quantise(groups, best, rule).flatten(-2), 4), best


def _error(groups: torch.Tensor, scale: torch.Tensor, rule: Convention) -> torch.Tensor:
    step = scale.float().unsqueeze(-1)
    return squared_error(groups, (quantise(groups, scale, rule) * step).bfloat16().float())


def squared_error(groups: torch.Tensor, served: torch.Tensor) -> torch.Tensor:
    """f32 [..., g] twice -> int64 [...]: the sum of the squared errors in units of the power of two in amax.

    In fixed point, so that the order of the sum is nothing: as many places as keep the sum of g squares below 2^31. An error
    counts LARGEST_ERROR at most: that is where `served` is infinite, next to the largest bf16.
    """
    _, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True).double())
    unit = torch.pow(2.0, 1.0 - exponent.clamp(min=-126).double()).float()
    error = ((groups - served) * unit).abs().clamp(max=LARGEST_ERROR)
    places = 29 - (groups.shape[-1] - 1).bit_length()
    return (error * error * 2.0**places).to(torch.int32).long().sum(-1)


def encode_exact(weight: torch.Tensor, group_size: int, rule: Convention) -> tuple[torch.Tensor, torch.Tensor, int]:
    """encode, but groups that codes and a bf16 scale reproduce to the bit get these; also the number of the other groups."""
    codes, scale, lost = quantise_exact(weight.float().view(-1, group_size), rule)
    return pack(codes.view(len(weight), -1), 4), scale.view(len(weight), -1), lost


def quantise_exact(groups: torch.Tensor, rule: Convention) -> tuple[torch.Tensor, torch.Tensor, int]:
    """f32 [n, g] of bf16 values -> f32 codes [n, g], bf16 scale [n], and the number of groups that these do not reproduce.

    If m is the largest magnitude among a group's codes, then amax = bf16(m * scale), and that scale is bf16(amax / m) or
    next to it. The first that fits is taken: m = 8 first (only where the largest value is negative), the nearest first.
    """
    scale = rule_scale(groups, rule)
    codes, fits = _try(groups, scale, rule)
    amax = groups.abs().amax(-1)
    zero = (amax == 0) & fits
    # Where the codes are 1 to 8 no value but zero is below an eighth of another; others are spared, most that were never INT4.
    smallest = torch.where(groups == 0, torch.inf, groups.abs()).amin(-1)
    open_ = (~zero & (amax <= 8 * smallest)).nonzero().squeeze(1)
    lost = len(groups) - int(zero.sum()) - len(open_)
    by_quotient = Convention(rule.name, rule.divisor, rule.lowest)
    for m in range(-rule.lowest, 0, -1):
        for offset in (0, -1, 1):
            bits = (amax[open_] / m).bfloat16().view(torch.int16) + offset
            candidate = bits.view(torch.bfloat16)
            # Most scales that do not fit already fail with the first values, which is found out sooner.
            _, fits = _try(groups[open_, :HEAD], candidate, by_quotient)
            likely = (fits & (bits > 0)).nonzero().squeeze(1)
            if not len(likely):
                continue
            places, candidate = open_[likely], candidate[likely]
            found, fits = _try(groups[places], candidate, by_quotient)
            if m > rule.highest:
                fits &= groups[places].amax(-1) < amax[places]
            scale[places[fits]], codes[places[fits]] = candidate[fits], found[fits]
            left = torch.ones_like(bits, dtype=torch.bool)
            left[likely[fits]] = False
            open_ = open_[left]
    return codes, scale, lost + len(open_)


def _try(groups: torch.Tensor, scale: torch.Tensor, rule: Convention) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of groups under a scale each, and whether they reproduce them."""
    codes = quantise(groups, scale, rule)
    return codes, _reproduces(codes, scale, groups)


def fake_quantise(weight: torch.Tensor, group_size: int, rule: Convention) -> torch.Tensor:
    """bf16 or f32 [rows, cols] -> the same type: decode of encode_exact of the weight in bf16.

    Groups with a value that is not finite become NaN.
    """
    groups = weight.bfloat16().float().view(-1, group_size)
    codes, scale, _ = quantise_exact(groups, rule)
    served = ((codes + 0.0) * scale.float().unsqueeze(-1)).bfloat16()
    return torch.where(groups.isfinite().all(-1, keepdim=True), served, torch.nan).to(weight.dtype).view_as(weight)


def _reproduces(codes: torch.Tensor, scale: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """bool [...]: whether every value of the group is bf16(code * scale), to the bit."""
    values = ((codes + 0.0) * scale.float().unsqueeze(-1)).bfloat16().float()
    return (values.view(torch.int32) == groups.view(torch.int32)).all(-1)
