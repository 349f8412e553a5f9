"""Unpacked eight-bit integers; see formats.int8 for the format and the rule."""

from __future__ import annotations

import torch

from kconvert.formats.int8 import CHANNEL_RULE
from kconvert.formats.reference.packed import quantise, rule_scale


def decode(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """int8 [rows, cols], scale and int8 zero point [rows or 1, groups] -> [rows, cols] in the scale's dtype.

    (code - zero point) * scale, rounded once.
    """
    groups = codes.view(len(codes), scale.shape[1], -1).float()
    if zero_point is not None:
        groups = groups - zero_point.float().unsqueeze(-1)
    return (groups * scale.float().unsqueeze(-1)).to(scale.dtype).flatten(-2)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [rows, cols] -> (int8 codes, bf16 scale [rows, 1]), by formats.int8.CHANNEL_RULE."""
    scale = rule_scale(weight.float(), CHANNEL_RULE)
    return quantise(weight.float(), scale, CHANNEL_RULE).to(torch.int8), scale.unsqueeze(1)
