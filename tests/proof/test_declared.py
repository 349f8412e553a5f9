"""Whether config.json covers all codes, as `verify` judges it by itself."""

from __future__ import annotations

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
