"""GPTQ's and AWQ's tensors as their tools pack them, and the values that these then have, for tests."""

from __future__ import annotations

import torch

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ packs column order[k] of eight into nibble k
Tensors = dict[str, torch.Tensor]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 [n, values] -> I32 [n, words]: 32 values become as many words as they have bits, by the text of the layout that
    auto-round gives (a value at bits [i * bits, (i + 1) * bits) of the stream)."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << place * bits for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [stream >> 32 * k & 0xFFFFFFFF for k in range(count)]
        rows.append([word - (word >> 31 << 32) for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    return pack(codes.view(len(codes), -1, 8)[..., AWQ_ORDER].flatten(1), 4)


def take_one(zeros: torch.Tensor, bits: int, spelling: str) -> torch.Tensor:
    """Zero points [groups, out] packed as the tool that the spelling is of stores them."""
    if spelling == "gptqmodel" and bits in (2, 4, 8):
        ones = sum(1 << place for place in range(0, 32, bits))
        return (pack(zeros, bits).long() - ones).to(torch.int32)  # what it subtracts from whole words
    stored = {"gptq_v2": zeros, "awq": zeros, "auto-round": zeros - 1}.get(spelling, (zeros - 1) % 2**bits)
    return pack_awq(stored) if spelling == "awq" else pack(stored, bits)


def make(
    rows: int, cols: int, size: int, bits: int, spelling: str, dtype: torch.dtype = torch.float16, ordered: bool = False
) -> tuple[Tensors, torch.Tensor]:
    """A weight's tensors, and its values by the formula that gptqmodel, AutoGPTQ, AutoAWQ and auto-round share:
    scales[g_idx] * (codes - zeros[g_idx]), transposed; in f32, rounded to bf16."""
    noise = torch.Generator().manual_seed(rows + cols + bits)
    groups = -(-cols // size)
    codes = torch.randint(0, 2**bits, (cols, rows), generator=noise)
    zeros = torch.randint(int(spelling == "auto-round"), 2**bits, (groups, rows), generator=noise)
    scales = (torch.randn(groups, rows, generator=noise) * 0.01).to(dtype)
    index = torch.arange(cols) // size
    if ordered:
        index = index[torch.randperm(cols, generator=noise)]
    tensors = {
        "qweight": pack_awq(codes) if spelling == "awq" else pack(codes.T, bits).T.contiguous(),
        "qzeros": take_one(zeros, bits, spelling),
        "scales": scales,
    }
    if ordered:
        tensors["g_idx"] = index.int()
    values = (scales.float()[index] * (codes - zeros[index]).float()).bfloat16()
    return tensors, values.T.contiguous()
