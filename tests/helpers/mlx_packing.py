"""MLX's encodings made the slow way, and checkpoints like those that mlx-lm writes."""

from __future__ import annotations

import numpy as np
import torch

BITS = (2, 3, 4, 5, 6, 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, cols] -> U32 [rows, cols * bits / 32]: all bits of a row in a line, the lowest of each code first."""
    single = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    return torch.from_numpy(
        np.packbits(single.reshape(len(codes), -1).astype("u1"), axis=1, bitorder="little").view("u4")
    )


def affine(rows: int, cols: int, bits: int, group: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """The three tensors of a random weight."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator)
    scales = (torch.randn(rows, cols // group, generator=generator) * 0.01).to(dtype)
    biases = (torch.randn(rows, cols // group, generator=generator) * 0.05).to(dtype)
    return {"weight": pack(codes, bits), "scales": scales, "biases": biases, "codes": codes}


def value(parts: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """bf16(code * scale + bias)."""
    scales, biases = (parts[key].float().repeat_interleave(group, 1) for key in ("scales", "biases"))
    return (parts["codes"].float() * scales + biases).bfloat16()
