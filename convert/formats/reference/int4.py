"""Four-bit codes with bf16 scales; see formats.int4 for the format and the meaning of a convention."""

from __future__ import annotations

import torch
from kconvert.formats.int4 import Convention


def unpack(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """I32 [rows, ceil(cols / 8)] -> int8 codes [rows, cols] in [-8, 7]; nibble j of word w is column 8w + j."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    return (nibbles.flatten(-2)[..., :cols] - 8).to(torch.int8)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [rows, cols] in [-8, 7] -> I32 [rows, ceil(cols / 8)]; nibbles past the last column are 0."""
    rows, cols = codes.shape
    nibbles = torch.zeros(rows, -(-cols // 8) * 8, dtype=torch.int64, device=codes.device)
    nibbles[:, :cols] = codes.to(torch.int64) + 8
    words = (nibbles.view(rows, -1, 8) << torch.arange(0, 32, 4, device=codes.device)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def decode(packed: torch.Tensor, scale: torch.Tensor, cols: int) -> torch.Tensor:
    """Codes and bf16 scales [rows, groups] -> bf16 [rows, cols] = bf16(f32(code) * f32(scale)), one rounding."""
    codes = unpack(packed, cols).float().view(*scale.shape, -1)
    return (codes * scale.float().unsqueeze(-1)).flatten(-2).bfloat16()


def encode(weight: torch.Tensor, group_size: int, convention: Convention) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [rows, cols] -> (I32 packed, bf16 scale [rows, cols / group_size]).

    scale = bf16(f32(amax) / divisor); code = clamp(round_half_even(f32(value) / f32(scale)), lowest, 7), 0 when scale is 0.
    """
    groups = weight.float().view(len(weight), -1, group_size)
    scale = (groups.abs().amax(-1) / convention.divisor).bfloat16()
    codes = torch.round(groups / scale.float().unsqueeze(-1)).clamp(convention.lowest, 7)
    codes = torch.where(scale.unsqueeze(-1) == 0, torch.zeros_like(codes), codes)
    return pack(codes.flatten(-2).to(torch.int8)), scale
