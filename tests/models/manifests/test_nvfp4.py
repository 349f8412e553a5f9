"""NVFP4 of models whose experts go by different names, and are in different encodings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kconvert import KconvertError, Recipe, convert, plan, verify


@pytest.mark.parametrize("name", ["deepseek-v4", "kimi-k3", "qwen3.5-moe", "glm-4-moe"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_other_models_become_nvfp4(small_sample: Callable[[str], Path], tmp_path: Path, name: str, layout: str) -> None:
    source = small_sample(name)
    if (name, layout) == ("deepseek-v4", "compressed-tensors"):
        with pytest.raises(KconvertError, match="it has modelopt"):
            plan(source, Recipe("nvfp4", layout=layout))
        return
    convert(plan(source, Recipe("nvfp4", layout=layout)), tmp_path / "out")
    verify(source, tmp_path / "out")


def test_kimi_k3_is_declared_under_the_names_that_engines_have(small_sample: Callable[[str], Path]) -> None:
    made = plan(small_sample("kimi-k3"), Recipe("nvfp4", layout="modelopt"))
    table = json.loads(made.texts["config.json"])["quantization_config"]
    assert (table["quant_method"], table["quant_algo"]) == ("modelopt_mixed", "MIXED_PRECISION")
    spellings = [
        f"{around}layers.1.{moe}.experts"
        for around in ("language_model.model.", "model.", "")
        for moe in ("block_sparse_moe", "mlp")
    ]
    assert all(table["quantized_layers"][name]["quant_algo"] == "NVFP4" for name in spellings)


def test_deepseek_v4_keeps_fp8_and_says_that_its_experts_are_nvfp4(small_sample: Callable[[str], Path]) -> None:
    made = plan(small_sample("deepseek-v4"), Recipe("nvfp4", layout="modelopt"))
    config = json.loads(made.texts["config.json"])
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["quantization_config"]["moe_quant_algo"] == "NVFP4"
    assert "expert_dtype" not in config
    assert made.facts["recovered"].keys() == {"mxfp4 -> nvfp4"}


def test_deepseek_v4_whose_attention_is_fp8_has_no_choice_of_it(small_sample: Callable[[str], Path]) -> None:
    with pytest.raises(
        KconvertError, match=r"attention as 'fp8' is not possible for deepseek-v4, .* stays in the encoding"
    ):
        plan(small_sample("deepseek-v4"), Recipe("nvfp4", layout="modelopt", attention="fp8"))
