"""compressed-tensors' presets: names that stand for a whole config group, as in `{"config_groups": {"W4A16": ["Linear"]}}`.

Source: https://github.com/vllm-project/compressed-tensors, `quantization/quant_scheme.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Group = Mapping[str, Any]


def _floats(bits: int, strategy: str, **more: Any) -> Group:
    return {"num_bits": bits, "type": "float", "strategy": strategy, **more}


def _integers(bits: int, strategy: str, **more: Any) -> Group:
    return {"num_bits": bits, "type": "int", "strategy": strategy, **more}


def _group(weights: Group, activations: Group | None = None) -> Group:
    return {"weights": weights} if activations is None else {"weights": weights, "input_activations": activations}


def _mx(bits: int) -> Group:
    return _floats(bits, "group", group_size=32, scale_dtype="torch.uint8")


NVFP4 = _floats(4, "tensor_group", group_size=16)
TOKENS = {bits: None if bits == 16 else _integers(bits, "token") for bits in (4, 8, 16)}

PRESETS: Mapping[str, Group] = {
    "UNQUANTIZED": {},
    **{
        f"W{bits}A{activations}": _group(_integers(bits, "group", group_size=128), TOKENS[activations])
        for bits in range(2, 9)
        for activations in (4, 8, 16)
        if bits <= activations
    },
    **dict.fromkeys(("W8A8", "INT8"), _group(_integers(8, "channel"), TOKENS[8])),
    "W4A16_ASYM": _group(_integers(4, "group", group_size=128, symmetric=False)),
    "W4AFP8": _group(_integers(4, "group", group_size=128), _floats(8, "token")),
    "FP8": _group(_floats(8, "tensor"), _floats(8, "tensor")),
    "FP8_DYNAMIC": _group(_floats(8, "channel"), _floats(8, "token")),
    "FP8_BLOCK": _group(_floats(8, "block", block_structure=[128, 128]), _floats(8, "group", group_size=128)),
    "NVFP4": _group(NVFP4, NVFP4),
    "NVFP4A16": _group(NVFP4),
    "MXFP4": _group(_mx(4), _mx(4)),
    "MXFP4A16": _group(_mx(4)),
    "MXFP4XFP8": _group(_mx(4), _floats(8, "group", group_size=128)),
    "MXFP6A8": _group(_mx(6), _mx(8)),
    "MXFP6A16": _group(_mx(6)),
    "MXFP8": _group(_mx(8), _mx(8)),
    "MXFP8A16": _group(_mx(8)),
}
