"""What config.json says of FP8 weights, in the words of each engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from kconvert import Recipe
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import with_quantization
from kconvert.dialects.compressed_tensors import compressed_fp8_table, ignore_list
from kconvert.dialects.fp8 import fp8_table
from kconvert.formats.dense import Dense
from kconvert.models.model import Model, understand
from kconvert.targets.conversion import Conversion
from kconvert.targets.sample import SampleRecipe, plan_synthetic


def weightless(like: str, **sizes: int) -> Model:
    """A model without a byte of its weights."""
    made = plan_synthetic(SampleRecipe(like, sizes))
    outputs = [output for step in made.steps for output in step.outputs]
    tensors = {name: Tensor(name, dtype, shape, "file", 0, 0) for name, dtype, shape in outputs}
    return understand(Checkpoint(Path(like), made.facts["config"], tensors, {}, {}, ()))


@pytest.fixture(scope="session")
def kimi_k2() -> Model:
    """Kimi-K2-Thinking, with two experts a layer for brevity."""
    return weightless("kimi-k2-thinking", experts=2)


def test_the_default_layout_lists_the_489_linears_of_k2_that_stay(kimi_k2: Model) -> None:
    table = Conversion(kimi_k2, Recipe("fp8")).config()["quantization_config"]
    names = table.pop("modules_to_not_convert")
    assert table == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    attention = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    expected = {f"model.layers.{layer}.self_attn.{name}" for layer in range(61) for name in attention}
    expected |= {f"model.layers.0.mlp.{name}" for name in mlp} | {"lm_head"}
    expected |= {f"model.layers.{layer}.mlp.shared_experts.{name}" for layer in range(1, 61) for name in mlp}
    assert len(names) == 489
    assert set(names) == expected


def test_layout_all_of_k2_is_the_published_one_and_lists_nothing(kimi_k2: Model) -> None:
    assert Conversion(kimi_k2, Recipe("fp8", layout="all")).config()["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize("layout", ["compressed-tensors", "compressed-tensors-channel"])
def test_compressed_tensors_understands_the_config_and_ignores_what_stays(kimi_k2: Model, layout: str) -> None:
    conversion = Conversion(kimi_k2, Recipe("fp8", layout=layout))
    table = conversion.config()["quantization_config"]
    parsed = QuantizationConfig.model_validate(table)
    scheme = parsed.config_groups["group_0"]
    assert scheme.weights.strategy == ("channel" if layout.endswith("channel") else "block")
    assert scheme.input_activations.dynamic is True
    assert parsed.format == "float-quantized"
    for weight in kimi_k2.weights:
        ignored = any(match_name(weight.name, pattern) for pattern in parsed.ignore)
        assert ignored == isinstance(conversion.encoding(weight), Dense), weight.name
    for name in ("model.layers.5.mlp.gate", "model.embed_tokens", "lm_head"):
        assert any(match_name(name, pattern) for pattern in parsed.ignore)


def test_the_compressed_tensors_table_is_llm_compressors() -> None:
    table = {name: value for name, value in compressed_fp8_table("block", [], []).items() if name != "ignore"}
    assert table == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "block",
                    "block_structure": [128, 128],
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": True,
                },
            }
        },
    }


def test_names_below_a_language_model_are_listed_with_and_without_its_prefix() -> None:
    names = ["language_model.lm_head", "language_model.model.layers.0.self_attn.o_proj", "vision_tower.blocks.0.wo"]
    assert fp8_table(names)["modules_to_not_convert"] == [
        *names,
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        # As transformers calls them, which has wqkv of the tower in three parts.
        "model.language_model.layers.0.self_attn.o_proj",
        "model.vision_tower",
    ]


NESTED = {
    "kimi-k2.5": ("vision_tower.encoder.blocks.0.wqkv", "model.vision_tower.layers.0.attn.q_proj"),
    "kimi-k3": ("vision_tower.encoder.blocks.0.wqkv", "mm_projector.proj.0"),
    "minimax-m3": ("vision_tower.anything", "model.vision_tower.anything"),
}
OUTPUTS = [("mxfp4", "experts"), ("int8", "experts"), ("int8", "all"), ("fp8", "compressed-tensors"), ("int4", "")]


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize(("to", "layout"), OUTPUTS)
def test_ignore_hits_what_stays_by_every_engines_name_and_nothing_else(name: str, to: str, layout: str) -> None:
    conversion = Conversion(weightless(name, layers=4, experts=2), Recipe(to, layout=layout))
    ignore = conversion.config()["quantization_config"]["ignore"]
    assert all(entry.startswith("re:") or entry == "lm_head" for entry in ignore)
    for weight in conversion.model.weights:
        inner = weight.name.removeprefix("language_model.").removeprefix("model.")
        for called in {weight.name, inner, f"model.{inner}", f"model.language_model.{inner}"}:
            ignored = any(match_name(called, pattern) for pattern in ignore)
            assert ignored == isinstance(conversion.encoding(weight), Dense), called
    if any(plain.role in ("vision", "vision_tower") for plain in conversion.model.plain):
        assert all(any(match_name(called, pattern) for pattern in ignore) for called in NESTED[name])


def test_a_pattern_that_would_hit_a_quantised_linear_gives_way_to_names() -> None:
    ignored = ignore_list(["model.layers.0.self_attn.q_a_proj"], ["model.layers.1.self_attn.q_a_proj", "lm_head"])
    assert "re:.*q_a_proj$" not in ignored
    assert "model.layers.1.self_attn.q_a_proj" in ignored
    assert ignored.count("lm_head") == 1


def test_a_nested_quantisation_goes_to_the_top_and_leaves_no_other(kimi_k2: Model) -> None:
    config = dict(kimi_k2.checkpoint.config)
    nested = {"text_config": {"quantization_config": config.pop("quantization_config"), "vocab_size": 3}}
    written = with_quantization({**config, **nested}, {"quant_method": "fp8"})
    assert written["quantization_config"] == {"quant_method": "fp8"}
    assert written["text_config"] == {"vocab_size": 3}
