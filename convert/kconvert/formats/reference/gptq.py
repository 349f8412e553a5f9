"""GPTQ's and AWQ's packed integers; see formats.gptq."""

from __future__ import annotations

import torch

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """I32 [n, words] of codes in a stream along each row -> int64 [n, words * 32 // bits]; low bits are first."""
    places = torch.arange(words.shape[1] * 32 // bits, device=words.device) * bits
    stream = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    word, shift = places // 32, places % 32
    codes: torch.Tensor = (stream[:, word] >> shift | (stream[:, word + 1] << (32 - shift))) & (2**bits - 1)
    return codes


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """I32 [n, words] in AWQ's order -> int64 [n, 8 * words]."""
    return unpack(words, 4).view(len(words), -1, 8)[..., ORDER].flatten(1)


def unpack_zeros(words: torch.Tensor, bits: int, spelling: str) -> torch.Tensor:
    """I32 [groups, words] -> zero points, int64 [groups, at least as many as there are rows]; see formats.gptq.ZEROS."""
    if spelling == "awq":
        return unpack_awq(words)
    if spelling == "gptqmodel" and 32 % bits == 0:
        ones = sum(1 << place for place in range(0, 32, bits))
        return unpack(words.long() + ones, bits)
    zeros = unpack(words, bits)
    if spelling == "auto-round":
        return zeros + 1
    return zeros if spelling == "gptq_v2" else (zeros + 1) % 2**bits


def decode(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    cols: int,
    group_size: int | None,
    g_idx: torch.Tensor | None = None,
    bits: int = 4,
    spelling: str = "gptq",
) -> torch.Tensor:
    """-> bf16 [out, in] = (code - zero point) * scale; `scales` [groups, out], the others as formats.gptq says."""
    rows = scales.shape[1]
    codes = unpack_awq(qweight).T if spelling == "awq" else unpack(qweight.T, bits)[:, :cols]
    if g_idx is None:
        g_idx = torch.arange(cols, device=qweight.device) // (group_size or cols)
    zeros = unpack_zeros(qzeros, bits, spelling)[:, :rows]
    return ((codes - zeros.T[:, g_idx]).float() * scales.float().T[:, g_idx]).bfloat16()
