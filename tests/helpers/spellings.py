"""Words of quantization_config, and codes, for checkpoints that tests write tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch

NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}
FP8 = {"quant_method": "fp8"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def declared(format: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def fp8_codes(rows: int = 130, cols: int = 200, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 30).to(torch.float8_e4m3fn)


def spread(scale: torch.Tensor, rows: int, cols: int, block: int = 128) -> torch.Tensor:
    return scale.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :cols]
