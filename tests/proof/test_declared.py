"""Whether config.json covers all codes, as `verify` judges it by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.proof.declared import undeclared

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def faults(table: dict[str, Any]) -> list[str]:
    """Of a checkpoint with one packed weight, whose config.json has this quantization_config."""
    parts = {"weight_packed": ("I32", (8, 4)), "weight_scale": ("BF16", (8, 1))}
    named = {f"model.up.{suffix}": facts for suffix, facts in parts.items()}
    tensors = {name: Tensor(name, dtype, shape, "a", 0, 16) for name, (dtype, shape) in named.items()}
    return list(undeclared(Checkpoint(Path(), {"quantization_config": table}, tensors, {}, {}, ())))


@pytest.mark.parametrize(
    "table",
    [
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS}}},
        {"quant_method": "compressed_tensors", "config_groups": {"g": {"targets": "Linear", "weights": WEIGHTS}}},
        {"config_groups": {"g": {"weights": WEIGHTS}}},
        {"config_groups": {"W4A16": ["re:.*up$"]}, "ignore": "lm_head"},
        {"quantization_config": {"config_groups": {"g": {"targets": ["model.up"], "weights": WEIGHTS}}}},
    ],
    ids=["a class", "one name", "no targets", "a preset", "a table within a table"],
)
def test_codes_that_any_spelling_of_a_quantisation_covers_are_declared(table: dict[str, Any]) -> None:
    assert not faults(table)


@pytest.mark.parametrize(
    "table",
    [
        {"quant_method": "hqq", "config_groups": {"g": {"weights": WEIGHTS}}},
        {"config_groups": {"g": {"targets": ["Linear"]}}},
        {"config_groups": {"g": {"targets": [], "weights": WEIGHTS}}},
        {"config_groups": {"UNQUANTIZED": ["Linear"]}},
        {"config_groups": {"W4A16": ["Linear"]}, "ignore": "re:.*up"},
    ],
    ids=["another method", "no weights", "nothing", "the preset of nothing", "ignored"],
)
def test_codes_that_no_group_means_are_a_fault(table: dict[str, Any]) -> None:
    assert "declares no quantisation of 'model.up'" in faults(table)[0]


@pytest.mark.parametrize(
    "junk", [{"config_groups": []}, {"config_groups": {"g": {"targets": [3, "re:("], "weights": 1}}}]
)
@pytest.mark.parametrize("method", ["compressed-tensors", "fp8", ["x"]])
def test_rubbish_in_a_table_that_no_reader_looks_at_covers_nothing(junk: dict[str, Any], method: Any) -> None:
    tensors = {"up.weight": Tensor("up.weight", "F8_E4M3", (8, 4), "a", 0, 32)}
    table = {
        **junk,
        "quant_method": method,
        "ignore": 3,
        "modules_to_not_convert": [["x"], "up"],
        "quantization_config": 1,
    }
    config = {"compression_config": table, "text_config": []}
    assert list(undeclared(Checkpoint(Path(), config, tensors, {}, {}, ())))


FP4 = {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}}
NVFP4 = {"quant_algo": "NVFP4"}


def float_faults(table: dict[str, Any], module: str, beside: Path | None = None) -> list[str]:
    """Of a checkpoint with one weight of floats in this module, declared by this table, in config.json or in a file."""
    parts = {"weight": ("U8", (8, 16)), "weight_scale": ("U8", (8, 1))}
    named = {f"{module}.{suffix}": facts for suffix, facts in parts.items()}
    tensors = {name: Tensor(name, dtype, shape, "a", 0, 16) for name, (dtype, shape) in named.items()}
    if beside is None:
        return list(undeclared(Checkpoint(Path(), {"quantization_config": table}, tensors, {}, {}, ())))
    (beside / "hf_quant_config.json").write_text(json.dumps(table))
    return list(undeclared(Checkpoint(beside, {}, tensors, {}, {}, ("hf_quant_config.json",))))


EXPERT, HEAD = "language_model.model.layers.0.mlp.experts.1.up_proj", "lm_head"


@pytest.mark.parametrize(
    "table",
    [
        {"quant_method": "modelopt", **NVFP4, "ignore": [HEAD, "*self_attn*"]},
        {"quant_method": "modelopt_fp4", "quantization": {**NVFP4, "exclude_modules": ["lm_head*"]}},
        {"quant_method": "modelopt_mixed", "quantized_layers": {"model.layers.0.mlp.experts": NVFP4}},
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"layers.*.experts*": NVFP4, HEAD: NVFP4},
            "ignore": [HEAD],
        },
        {"quant_method": "quark", "global_quant_config": FP4, "exclude": ["re:.*head", "*gate"]},
        {"global_quant_config": FP4, "layer_quant_config": {HEAD: {"weight": None}}},
        {"quant_method": "quark", "layer_quant_config": {"*experts*": FP4}},
        {"quant_method": "quark", "layer_type_quant_config": {"Linear": FP4}, "exclude": [HEAD]},
        {"quant_method": "mxfp8", "ignored_layers": [HEAD]},
    ],
    ids=str,
)
def test_floats_are_declared_in_the_words_of_each_dialect(table: dict[str, Any]) -> None:
    assert not float_faults(table, EXPERT)
    assert f"declares no quantisation of '{HEAD}'" in float_faults(table, HEAD)[0]


@pytest.mark.parametrize("table", [{"quant_method": "modelopt"}, {"quant_method": "quark"}, {"quantization": 3}])
def test_a_table_that_names_no_encoding_covers_nothing(table: dict[str, Any]) -> None:
    assert float_faults(table, EXPERT)


def test_a_file_beside_config_json_declares_what_that_does_not(tmp_path: Path) -> None:
    table = {"producer": {}, "quantization": {**NVFP4, "exclude_modules": [HEAD]}}
    assert not float_faults(table, EXPERT, tmp_path)
    assert float_faults(table, HEAD, tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{")
    assert float_faults({}, EXPERT, tmp_path)
