"""ModelOpt's, Quark's and DeepSeek-V4's floats where they are damaged: one sentence that names the file and the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kconvert import KconvertError, Recipe, convert, plan

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
QUARK_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
QUARK = {"quant_method": "quark", "global_quant_config": {"weight": QUARK_FP4}}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
V4 = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
NAME = "layers.0.ffn.experts.1.w2"


def codes(columns: int = 32, dtype: torch.dtype = torch.uint8, wrong: int = 0x21) -> torch.Tensor:
    packed = torch.full((32, columns), 0x21, dtype=torch.uint8)
    packed[3, 1] = wrong
    return packed.view(dtype)


def exponents(columns: int = 2, dtype: torch.dtype = torch.uint8, wrong: int = 120) -> torch.Tensor:
    scale = torch.full((32, columns), 120, dtype=torch.uint8)
    scale[3, 1] = wrong
    return scale.view(dtype)


def eighths(wrong: int = 0x38, columns: int = 4) -> torch.Tensor:
    scale = torch.full((32, columns), 0x38, dtype=torch.uint8)
    scale[3, 1] = wrong
    return scale.view(E4M3)


NVFP4 = {"weight": codes(), "weight_scale": eighths(), "weight_scale_2": torch.tensor(0.01)}
FP4 = {"weight": codes(), "weight_scale": exponents()}
FP8 = {"weight": codes(64, E4M3), "weight_scale_inv": exponents()}
EXPERT = {"weight": codes(32, torch.int8), "scale": exponents(dtype=E8M0)}
INT4 = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32}
PAIRED = {"weight": codes(64), "weight_scale": torch.ones(64, 2)}
FULL = torch.full((), 1.0)
# What is declared, the sound tensors, those that are put in their place (None: taken away), what is said.
CASES: dict[str, tuple[dict[str, Any], Tensors, dict[str, Any], str]] = {
    "nvfp4, no scale": (MODELOPT, NVFP4, {"weight_scale": None}, "it has no weight_scale, but weight, weight_scale_2"),
    "nvfp4, no factor": (
        MODELOPT,
        NVFP4,
        {"weight_scale_2": None},
        "it has no weight_scale_2, but weight, weight_scale",
    ),
    "nvfp4, no codes": (MODELOPT, NVFP4, {"weight": None}, "it has no weight, but weight_scale, weight_scale_2"),
    "nvfp4, two factors": (MODELOPT, NVFP4, {"weight_global_scale": FULL}, "weight_global_scale does not belong to it"),
    "nvfp4, codes twice": (MODELOPT, NVFP4, {"weight_packed": codes()}, "of which weight_packed does not belong to it"),
    "nvfp4, foreign": (MODELOPT, NVFP4, {"weight_scale_inv": FULL}, "of which weight_scale_inv does not belong to it"),
    "nvfp4, misshapen scale": (
        MODELOPT,
        NVFP4,
        {"weight_scale": eighths(columns=5)},
        "weight_scale' is F8_E4M3 [32, 5]",
    ),
    "nvfp4, scale in bf16": (MODELOPT, NVFP4, {"weight_scale": torch.ones(32, 4).bfloat16()}, "weight_scale' is BF16"),
    "nvfp4, factors": (MODELOPT, NVFP4, {"weight_scale_2": torch.ones(32)}, "weight_scale_2' is F32 [32]"),
    "nvfp4, factor in f16": (MODELOPT, NVFP4, {"weight_scale_2": FULL.half()}, "weight_scale_2' is F16 []"),
    "nvfp4, codes in i8": (MODELOPT, NVFP4, {"weight": codes(dtype=torch.int8)}, "weight' is I8 [32, 32]"),
    "nvfp4, nan scale": (MODELOPT, NVFP4, {"weight_scale": eighths(0x7F)}, "weight_scale' is not finite at [3, 1]"),
    "nvfp4, negative scale": (MODELOPT, NVFP4, {"weight_scale": eighths(0xB8)}, "weight_scale' is negative at [3, 1]"),
    "nvfp4, factor 0": (MODELOPT, NVFP4, {"weight_scale_2": FULL * 0}, "weight_scale_2' is zero at [0]"),
    "nvfp4, factor nan": (
        MODELOPT,
        NVFP4,
        {"weight_scale_2": FULL * torch.nan},
        "weight_scale_2' is not finite at [0]",
    ),
    "nvfp4, factor inf": (
        MODELOPT,
        NVFP4,
        {"weight_scale_2": FULL * torch.inf},
        "weight_scale_2' is not finite at [0]",
    ),
    "nvfp4, factor below 0": (MODELOPT, NVFP4, {"weight_scale_2": -FULL}, "weight_scale_2' is negative at [0]"),
    "awq": (
        MODELOPT,
        NVFP4,
        {"pre_quant_scale": torch.ones(64)},
        "its pre_quant_scale is a factor of what goes into it",
    ),
    "svdquant": (MODELOPT, NVFP4, {"svdquant_lora_a": torch.ones(4, 64)}, "its svdquant_lora_a is part of a product"),
    "nvfp4 as fp8": (
        {**MODELOPT, "quant_algo": "FP8"},
        NVFP4,
        {},
        "weight_scale_2 does not belong to it, while config.json",
    ),
    "nvfp4 in groups of 32": (
        {**MODELOPT, "group_size": 32},
        NVFP4,
        {},
        "tensor_group 32 is not supported; supported: NVFP4",
    ),
    "int4, codes in i8": (
        INT4,
        PAIRED,
        {"weight": codes(64, torch.int8)},
        "its weight is I8 [32, 64], not an U8 matrix",
    ),
    "int4, misshapen scale": (INT4, PAIRED, {"weight_scale": torch.ones(32, 2)}, "weight_scale' is F32 [32, 2], but"),
    "int4, awq": (
        INT4,
        PAIRED,
        {"pre_quant_scale": torch.ones(64)},
        "its pre_quant_scale is a factor of what goes into",
    ),
    "w4a8": (INT4, PAIRED, {"weight_scale_2": FULL}, "of which weight_scale_2 does not belong to it"),
    "quark, no scale": (QUARK, FP4, {"weight_scale": None}, "weight' is U8 [32, 32], which no rule decodes"),
    "quark, misshapen scale": (QUARK, FP4, {"weight_scale": exponents(3)}, "weight_scale' is U8 [32, 3]"),
    "quark, scale in f32": (
        QUARK,
        FP4,
        {"weight_scale": torch.ones(32, 2)},
        "its weight_scale is F32, not U8 or F8_E8M0",
    ),
    "quark, E = 255": (QUARK, FP4, {"weight_scale": exponents(wrong=255)}, "weight_scale' is not finite at [3, 1]"),
    "quark, foreign": (QUARK, FP4, {"weight_scale_2": FULL}, "of which weight_scale_2 does not belong to it"),
    "mxfp8, misshapen scale": (MXFP8, FP8, {"weight_scale_inv": exponents(4)}, "weight_scale_inv' is U8 [32, 4]"),
    "mxfp8, E = 255": (
        MXFP8,
        FP8,
        {"weight_scale_inv": exponents(wrong=255)},
        "weight_scale_inv' is not finite at [3, 1]",
    ),
    "mxfp8, nan code": (MXFP8, FP8, {"weight": codes(64, wrong=0xFF).view(E4M3)}, "it has a code that is NaN in rows"),
    "fp8, nan code": (
        {**MODELOPT, "quant_algo": "FP8"},
        {"weight": codes(64, wrong=0x7F).view(E4M3), "weight_scale": FULL},
        {},
        "it has a code that is NaN in rows",
    ),
    "mxfp8, no codes": (MXFP8, FP8, {"weight": None}, "it has no weight, but weight_scale_inv"),
    "v4, no scale": (V4, EXPERT, {"scale": None}, "weight' is I8 [32, 32], which no rule decodes"),
    "v4, misshapen scale": (V4, EXPERT, {"scale": exponents(3, E8M0)}, "scale' is F8_E8M0 [32, 3]"),
    "v4, scale in f32": (V4, EXPERT, {"scale": torch.ones(32, 2)}, "its scale is F32, not U8 or F8_E8M0"),
    "v4, E = 255": (V4, EXPERT, {"scale": exponents(dtype=E8M0, wrong=255)}, "scale' is not finite at [3, 1]"),
    "v4, scale twice": (V4, EXPERT, {"weight_scale": exponents()}, "of which weight_scale does not belong to it"),
    "v4, codes in i32": (V4, EXPERT, {"weight": codes(128, torch.int32)}, "its weight is I32, not U8 or I8"),
    "v4 as fp8": ({**V4, "expert_dtype": "fp8"}, EXPERT, {}, "its weight is I8 [32, 32], not an F8_E4M3 matrix"),
    "v4, a stack": (V4, EXPERT, {"weight": codes(32, torch.int8)[None]}, "is not a matrix"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_weight_is_said_by_name(write: Write, tmp_path: Path, case: str) -> None:
    quantization, sound, changes, said = CASES[case]
    tensors = {f"{NAME}.{key}": tensor for key, tensor in {**sound, **changes}.items() if tensor is not None}
    source = write(tensors, quantization)
    with pytest.raises(KconvertError) as raised:
        convert(plan(source, Recipe("bf16")), tmp_path / "out")
    sentence = str(raised.value)
    assert said in sentence, sentence
    assert NAME in sentence
    assert "model.safetensors" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("quantization", "tensors"), [(MODELOPT, NVFP4), (QUARK, FP4), (MXFP8, FP8), (V4, EXPERT), (INT4, PAIRED)], ids=str
)
def test_the_sound_ones_are_sound(write: Write, tmp_path: Path, quantization: dict[str, Any], tensors: Tensors) -> None:
    source = write({f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}, quantization)
    convert(plan(source, Recipe("bf16")), tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"quant_method": "modelopt"}, "quant_algo is missing; the name of an algorithm belongs there"),
        (
            {"quant_method": "modelopt", "quant_algo": "IQ3"},
            "quant_algo is 'IQ3', which is not read; convert the checkpoint",
        ),
        ({"quant_method": "modelopt", "quant_algo": 4}, "quant_algo is 4; a name belongs there"),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
            "quantized_layers is missing; a table belongs there",
        ),
        ({"quant_method": "modelopt", "quantized_layers": {"a": 3}}, "quantized_layers.a is 3; a table belongs there"),
        ({**MODELOPT, "group_size": -16}, "group_size is -16; a positive number belongs there"),
        ({**MODELOPT, "group_size": 10**60}, "...0000000000000000000; a number of fewer digits belongs there"),
        ({**MXFP8, "weight_block_size": [1, 10**60]}, "0000]; a pair of positive numbers"),
        ({**MODELOPT, "ignore": 3}, "ignore is 3; a list of names belongs there"),
        ({"quant_method": "quark", "global_quant_config": 3}, "global_quant_config is 3; a table belongs there"),
        ({**QUARK, "exclude": ["re:("]}, "exclude has 're:(', which is no regular expression"),
        ({**QUARK, "layer_quant_config": {"a": {"weight": [QUARK_FP4]}}}, "layer_quant_config.a.weight is ["),
        ({**MXFP8, "weight_block_size": [0, 32]}, "weight_block_size is [0, 32]; a pair of positive numbers"),
        ({**V4, "expert_dtype": ["fp4"]}, "expert_dtype is ['fp4']; a name belongs there"),
    ],
    ids=str,
)
def test_what_makes_no_sense_in_the_config_is_named(write: Write, table: dict[str, Any], said: str) -> None:
    with pytest.raises(KconvertError) as raised:
        plan(write({"a.weight": codes()}, table), Recipe("bf16"))
    assert said in str(raised.value)
    assert str(raised.value).startswith("config.json: quantization_config.")


def test_what_makes_no_sense_in_a_file_beside_config_json_is_named_with_it(write: Write) -> None:
    root = write({f"{NAME}.{suffix}": tensor for suffix, tensor in NVFP4.items()}, {})
    (root / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "IQ3"}}))
    with pytest.raises(KconvertError, match=r"/hf_quant_config\.json: quantization\.quant_algo is 'IQ3', which is not"):
        plan(root, Recipe("bf16"))
    (root / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "MXFP4"}}))
    with pytest.raises(KconvertError, match=f"{NAME}.* while hf_quant_config.json says it is mxfp4"):
        plan(root, Recipe("bf16"))
