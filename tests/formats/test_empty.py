"""A weight without rows or columns is one in the output, too, or is refused before anything is written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spellings import BLOCKS, FP8, declared, fp8_codes

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.proof.inventory import take_inventory
from kconvert.targets.amx import AmxRecipe, plan_repack

Write = Callable[..., Path]

EMPTY = {
    "int4": (
        lambda r, c: {
            "weight_packed": torch.zeros(r, c // 8, dtype=torch.int32),
            "weight_scale": torch.ones(r, c // 32),
        },
        declared("pack-quantized", num_bits=4, strategy="group", group_size=32),
    ),
    "int4 channel": (
        lambda r, c: {"weight_packed": torch.zeros(r, c // 8, dtype=torch.int32), "weight_scale": torch.ones(r, 1)},
        declared("pack-quantized", num_bits=4, strategy="channel"),
    ),
    "int8 channel": (
        lambda r, c: {"weight": torch.zeros(r, c, dtype=torch.int8), "weight_scale": torch.ones(r, 1)},
        declared("int-quantized", strategy="channel"),
    ),
    "int8 tensor": (
        lambda r, c: {"weight": torch.zeros(r, c, dtype=torch.int8), "weight_scale": torch.ones(())},
        declared("int-quantized", strategy="tensor"),
    ),
    "int4 unpacked": (
        lambda r, c: {"weight": torch.zeros(r, c, dtype=torch.int8), "weight_scale": torch.ones(r, c // 32)},
        declared("int-quantized", num_bits=4, strategy="group", group_size=32),
    ),
    "fp8 block": (
        lambda r, c: {"weight": fp8_codes(r, c), "weight_scale_inv": torch.ones(-(-r // 128), -(-c // 128))},
        BLOCKS,
    ),
    "fp8 channel": (lambda r, c: {"weight": fp8_codes(r, c), "weight_scale": torch.ones(r, 1)}, FP8),
    "fp8 tensor": (lambda r, c: {"weight": fp8_codes(r, c), "weight_scale": torch.ones(())}, FP8),
    "mxfp4": (
        lambda r, c: {
            "weight_packed": torch.zeros(r, c // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(r, c // 32, dtype=torch.uint8),
        },
        declared("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "nvfp4": (
        lambda r, c: {
            "weight_packed": torch.zeros(r, c // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(r, c // 16).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.ones(()),
        },
        declared("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
}


@pytest.mark.parametrize("shape", [(0, 256), (128, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", EMPTY)
def test_a_weight_without_values_becomes_one_without_values(
    write: Write, raw: Any, tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    make, quantization = EMPTY[name]
    tensors = {f"a.{suffix}": tensor for suffix, tensor in make(*shape).items()}
    tensors |= {f"b.{suffix}": tensor for suffix, tensor in make(128, 256).items()}
    source = write(tensors, quantization)
    take_inventory(inspect(source))
    for to in ("bf16", "fp8", "int4", "int8", "mxfp4"):
        if {"int4": "int4", "fp8 block": "fp8", "mxfp4": "mxfp4"}.get(name) == to:
            continue  # there is nothing to convert
        convert(plan(source, Recipe(to)), tmp_path / to)
        verify(source, tmp_path / to)
        (a, _) = inspect(tmp_path / to).weights or (None, None)
        assert a is None or (a.rows, a.cols) == shape
    assert raw.load(tmp_path / "bf16")["a.weight"].shape == list(shape)


def test_a_model_whose_experts_have_no_values_is_converted_and_is_nothing_to_repack(
    int4_copy: Path, raw: Any, tmp_path: Path
) -> None:
    checkpoint = raw.load(int4_copy)
    for name in [name for name in checkpoint if ".experts." in name]:
        down = "down_proj" in name
        shape = {"weight_packed": [256, 0] if down else [0, 32], "weight_scale": [256, 0] if down else [0, 8]}
        tensor = checkpoint[name]
        tensor.shape = shape.get(name.rpartition(".")[2], [2])
        tensor.data = struct.pack("<2i", *((256, 0) if down else (0, 256))) if tensor.shape == [2] else b""
    checkpoint.config["moe_intermediate_size"] = 0
    for name in [name for name in checkpoint if "shared_experts" in name]:
        checkpoint[name].shape, checkpoint[name].data = [256, 0] if "down_proj" in name else [0, 256], b""
    source = checkpoint.save()
    for to in ("bf16", "fp8", "int8"):
        convert(plan(source, Recipe(to)), tmp_path / to)
        verify(source, tmp_path / to)
    with pytest.raises(KconvertError, match="intermediate size"):
        plan_repack(inspect(source), AmxRecipe("AMXINT4", 1))
