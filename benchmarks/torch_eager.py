"""INT4 <-> BF16 in torch eager, as fast as one would write it, and by compressed-tensors: what the kernels compete with."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

GROUP = 32
ARGS = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
SCHEME = QuantizationScheme(targets=["Linear"], weights=ARGS)


def decode(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """I32 codes, BF16 scales -> BF16: unpack the nibbles, multiply, cast."""
    nibbles = packed.view(torch.uint8)
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).view(torch.int8) - 8
    values = codes.view(*scale.shape, GROUP) * scale.float()[:, :, None]
    return values.to(torch.bfloat16).flatten(1)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """BF16 -> I32 codes and BF16 scales by the Kimi rule."""
    groups = weight.float().view(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    steps = scale.float().masked_fill(scale == 0, torch.inf)
    codes = ((groups / steps[:, :, None]).round().clamp(-7, 7) + 8).to(torch.uint8).view(len(weight), -1, 2)
    return (codes[:, :, 0] | codes[:, :, 1] << 4).view(torch.int32), scale


def decode_compressed_tensors(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' own decompression."""
    shape = torch.tensor([packed.shape[0], packed.shape[1] * 8])
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}
    values: torch.Tensor = PackedQuantizationCompressor.decompress(parts, SCHEME)["weight"]
    return values
