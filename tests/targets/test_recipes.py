"""Recipes in files: several encodings in one output, by role or by glob of names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.dialects.compressed_tensors import patterns
from kconvert.proof.diff import diff
from kconvert.targets.mixed.rules import parse_mix, read_mix
from kconvert.targets.sample import SampleRecipe, plan_synthetic

MIXED = """
layout = "compressed-tensors"

[encodings]
"model.layers.2.*" = "bf16"
"expert" = "nvfp4"
"shared.down" = "int4"
"shared" = "mxfp4"
"dense" = "int8"
"attention.o" = "fp8-block"
"attention" = "fp8"
"""


def labels(root: Path) -> dict[str, set[str]]:
    """The formats of each role, those of layer 2 apart."""
    found: dict[str, set[str]] = {}
    for weight in inspect(root).weights:
        key = "layer 2" if weight.layer == 2 else weight.role
        found.setdefault(key, set()).add(weight.format.label)
    return found


def by(text: str, **options: Any) -> Recipe:
    return Recipe("recipe", mix=parse_mix(text, "a recipe"), **options)


def test_the_first_rule_that_fits_counts_and_the_output_declares_all(int4: Path, tmp_path: Path) -> None:
    convert(plan(int4, by(MIXED)), tmp_path / "out")
    verify(int4, tmp_path / "out")
    found = labels(tmp_path / "out")
    assert found.pop("layer 2") == {"bf16"}
    assert found["shared.down"] == {"int4 group 32"}
    assert found["expert.gate"] == found["expert.up"] == found["expert.down"] == {"nvfp4"}
    assert found["shared.up"] == {"mxfp4"}
    assert found["dense.up"] == {"int8 channel"}
    assert found["attention.o"] == {"fp8 block 128x128"}
    assert found["attention.q_a"] == {"fp8 channel"}
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert table["format"] == "mixed-precision"
    config = QuantizationConfig.model_validate({k: v for k, v in table.items() if k != "quant_method"})
    for weight in inspect(tmp_path / "out").weights:
        groups = config.config_groups.values()
        hit = [group.format for group in groups if any(match_name(weight.name, target) for target in group.targets)]
        ignored = any(match_name(weight.name, target) for target in config.ignore)
        assert (len(hit), ignored) == ((1, False) if weight.format.quantised else (0, True)), weight.name


@pytest.mark.parametrize("encoding", ["mxfp4", "nvfp4", "mxfp8", "int4", "int8"])
def test_a_rule_for_the_experts_writes_the_tensors_that_a_target_does(
    bf16: Path, tmp_path: Path, encoding: str
) -> None:
    convert(plan(bf16, Recipe(encoding)), tmp_path / "target")
    convert(plan(bf16, by(f'[encodings]\n"expert" = "{encoding}"')), tmp_path / "recipe")
    found = diff(tmp_path / "target", tmp_path / "recipe")
    assert found.same
    assert not found.changes


def test_the_output_says_by_which_recipe_it_was_made(int4: Path, tmp_path: Path) -> None:
    made = plan(int4, by(MIXED))
    convert(made, tmp_path / "out")
    assert read_mix(tmp_path / "out" / "recipe.toml") == parse_mix(MIXED, "")
    assert "shared.down = int4, shared = mxfp4" in made.facts["recipe"]


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_attention_in_fp8_beside_experts_in_nvfp4(int4: Path, tmp_path: Path, layout: str) -> None:
    convert(plan(int4, Recipe("nvfp4", layout=layout, attention="fp8")), tmp_path / "out")
    verify(int4, tmp_path / "out")
    found = labels(tmp_path / "out")
    assert found["expert.up"] == {"nvfp4"}
    assert found["attention.o"] == {"fp8 channel" if layout == "compressed-tensors" else "fp8 tensor"}
    assert found["shared.up"] == {"bf16"}


def test_modelopt_names_layers_by_algorithm_and_has_scales_of_tensors(int4: Path, tmp_path: Path) -> None:
    convert(plan(int4, Recipe("nvfp4", layout="modelopt", attention="fp8")), tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (table["quant_method"], table["quant_algo"]) == ("modelopt_mixed", "MIXED_PRECISION")
    assert beside["quantized_layers"] == table["quantized_layers"]
    attention = "model.layers.1.self_attn"
    assert table["quantized_layers"]["model.layers.1.mlp.experts"] == {"quant_algo": "NVFP4", "group_size": 16}
    for name in ("o_proj", "q_a_proj", "fused_qkv_a_proj_with_mqa"):
        assert table["quantized_layers"][f"{attention}.{name}"] == {"quant_algo": "FP8"}
    tensors = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    one, other = (tensors[f"{attention}.{name}.weight_scale"] for name in ("q_a_proj", "kv_a_proj_with_mqa"))
    assert torch.equal(one, other)  # fused
    source = {k: v for path in int4.glob("*.safetensors") for k, v in load_file(path).items()}
    largest = max(
        float(source[f"{attention}.{name}.weight"].abs().max()) for name in ("q_a_proj", "kv_a_proj_with_mqa")
    )
    assert float(one) == float(torch.tensor(largest / 448, dtype=torch.float32))
    assert float(tensors[f"{attention}.o_proj.input_scale"]) == 1


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-fp8-attention"])
def test_a_preset_is_a_recipe_by_its_name(int4: Path, name: str) -> None:
    made = plan(int4, Recipe("recipe", mix=read_mix(name, "modelopt")))
    assert "modelopt: expert = nvfp4" in made.facts["recipe"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[encodings", "is no TOML"),
        ("layout = 'gguf'\n[encodings]\nexpert = 'nvfp4'", "layout is 'gguf'; it is compressed-tensors or modelopt"),
        ("layout = 1\n[encodings]\nexpert = 'nvfp4'", "layout is 1"),
        ("encodings = 3", "encodings is no table"),
        ("[encodings]", "encodings is no table"),
        ("to = 'nvfp4'\n[encodings]\nexpert = 'nvfp4'", "the key 'to' is not known"),
        ("[encodings]\nexpert = 'fp9'", "is 'fp9', which compressed-tensors has no word for"),
        ("layout = 'modelopt'\n[encodings]\nexpert = 'int4'", "which modelopt has no word for"),
        ("[encodings]\nexpert.down = 'int4'", "write a name with dots in quotes"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(KconvertError, match=sentence):
        parse_mix(text, "a recipe")


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("atention", "'atention' is no role of this model .*attention.kv_a"),
        ("expert.dwn", "'expert.dwn' is no role of this model"),
        ("*.experts.99.*", "matches no weight; globs are of whole names"),
    ],
)
def test_a_rule_that_means_nothing_here_is_a_sentence(int4: Path, rule: str, sentence: str) -> None:
    with pytest.raises(KconvertError, match=sentence):
        plan(int4, by(f"[encodings]\n'{rule}' = 'nvfp4'"))


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        (
            "'expert.gate' = 'nvfp4'\n'expert.up' = 'int4'\n'expert' = 'nvfp4'",
            "gate_proj' nvfp4 .by its rule 'expert.gate'. and '.*up_proj' int4 .by its rule 'expert.up'., which engines fuse",
        ),
        ("'*shared*gate*' = 'fp8'", "gate_proj' fp8 .* and '.*up_proj' bf16 .as no rule names it., which engines fuse"),
        ("'attention.q_a' = 'fp8'", "kv_a_proj_with_mqa' bf16 .* and '.*q_a_proj' fp8 .*, which engines fuse"),
        ("'expert.down' = 'int4'\n'expert' = 'nvfp4'", "engines have one encoding for all experts of a layer"),
        ("'*.experts.[01].*' = 'nvfp4'", "experts.0.* nvfp4 .* and '.*experts.2.* bf16 .*one encoding for all experts"),
        ("'expert' = 'nvfp4'\n'expert.down' = 'int4'", "'expert.down' never counts, as rules above it"),
        ("'vision' = 'fp8'\n'mtp' = 'fp8'", r"no weight that the recipe names \(it names vision, mtp\)"),
    ],
)
def test_rules_that_engines_or_each_other_leave_no_room_are_a_sentence(int4: Path, rules: str, sentence: str) -> None:
    with pytest.raises(KconvertError, match=sentence):
        plan(int4, by(f"[encodings]\n{rules}"))


def test_a_role_that_the_model_lacks_is_told_with_the_plan(int4: Path) -> None:
    notes = plan(int4, by("[encodings]\n'expert' = 'nvfp4'\n'vision' = 'fp8'")).facts["notes"]
    assert notes == ["the recipe's vision = fp8 has no effect, as the model has no weight in this role"]


def test_what_an_option_means_is_told_as_that_option(int4: Path) -> None:
    recipe = Recipe("nvfp4", attention="fp8", exclude=("*self_attn*",))
    notes = plan(int4, recipe).facts["notes"]
    assert (
        "of --attention fp8, the rule attention = fp8 has no effect, as the model has no weight in this role" in notes
    )


def test_experts_of_several_layers_may_have_several_encodings(int4: Path) -> None:
    facts = plan(int4, by("[encodings]\n'model.layers.1.*experts.*' = 'mxfp4'\n'expert' = 'nvfp4'")).facts
    assert {"int4 group 32 -> mxfp4", "int4 group 32 -> nvfp4"} <= facts["lossy"].keys()


def test_what_is_kept_stays_with_what_config_json_says_of_it(int4_copy: Path, tmp_path: Path) -> None:
    config = json.loads((int4_copy / "config.json").read_text())
    table = config.get("quantization_config") or config["text_config"]["quantization_config"]
    table["config_groups"]["group_0"]["input_activations"] = inputs = {"num_bits": 8, "type": "float", "dynamic": True}
    (int4_copy / "config.json").write_text(json.dumps(config))
    convert(plan(int4_copy, by("[encodings]\n'attention' = 'fp8'\n'expert' = 'keep'")), tmp_path / "out")
    verify(int4_copy, tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = [group for group in table["config_groups"].values() if group["format"] == "pack-quantized"]
    assert group["input_activations"] == inputs
    assert (group["weights"]["num_bits"], table["format"]) == (4, "mixed-precision")
    found = labels(tmp_path / "out")
    assert (found["expert.up"], found["attention.o"]) == ({"int4 group 32"}, {"fp8 channel"})
    assert read_mix(tmp_path / "out" / "recipe.toml").rules == (("attention", "fp8"), ("expert", "keep"))


def test_modelopts_weights_are_kept_in_modelopts_dialect(int4: Path, tmp_path: Path) -> None:
    convert(plan(int4, Recipe("nvfp4", layout="modelopt", attention="fp8")), tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    layers = config["quantization_config"]["quantized_layers"]
    layers["model.layers.2.mlp.experts"] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    recipe = by("layout = 'modelopt'\n[encodings]\n'attention' = 'bf16'\n'*' = 'keep'")
    convert(plan(tmp_path / "mixed", recipe), tmp_path / "out")
    verify(tmp_path / "mixed", tmp_path / "out")
    assert labels(tmp_path / "out")["attention.o"] == {"bf16"}
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quantized_layers"]
    assert kept["model.layers.2.mlp.experts"]["quant_algo"] == "W4A16_NVFP4"
    assert kept["model.layers.1.mlp.experts"]["quant_algo"] == "NVFP4"
    assert not any("attn" in name for name in kept)


def test_a_flat_declaration_of_modelopt_is_kept(int4: Path, tmp_path: Path) -> None:
    convert(plan(int4, Recipe("nvfp4", layout="modelopt")), tmp_path / "nvfp4")
    convert(
        plan(tmp_path / "nvfp4", by("layout = 'modelopt'\n[encodings]\n'attention' = 'fp8'\n'expert' = 'keep'")),
        tmp_path / "out",
    )
    verify(tmp_path / "nvfp4", tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quantized_layers"]
    assert layers["model.layers.1.mlp.experts"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert layers["model.layers.1.self_attn.o_proj"] == {"quant_algo": "FP8"}


def test_what_another_dialect_declares_cannot_be_kept(int4: Path, fp8: Path) -> None:
    with pytest.raises(
        KconvertError, match=r"cannot stay int4 group 32, as .* does not say that in the dialect modelopt"
    ):
        plan(int4, by("layout = 'modelopt'\n[encodings]\n'attention' = 'fp8'\n'expert' = 'keep'"))
    with pytest.raises(KconvertError, match=r"cannot stay fp8 block 128x128, as .* the dialect compressed-tensors"):
        plan(fp8, by("[encodings]\n'attention' = 'fp8'\n'expert' = 'keep'"))


def test_a_recipe_that_keeps_everything_is_the_source_again(int4: Path) -> None:
    with pytest.raises(KconvertError, match="nothing to convert"):
        plan(int4, by("[encodings]\n'*' = 'keep'"))


@pytest.mark.parametrize("name", ["deepseek-v4", "deepseek-v4.1"])
def test_deepseek_v4_keeps_its_fp8_beside_experts_in_nvfp4(tmp_path: Path, name: str) -> None:
    sizes = {"layers": 5, "experts": 2, "hidden": 256, "moe_intermediate": 128, "vocab": 128, "heads": 4, "q_rank": 128}
    convert(plan_synthetic(SampleRecipe(name, sizes)), tmp_path / "v4")
    rules = "layout = 'modelopt'\n[encodings]\n'layers.*.experts.*' = 'nvfp4'\n'*' = 'keep'"
    convert(plan(tmp_path / "v4", by(rules)), tmp_path / "out")
    verify(tmp_path / "v4", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (table["quant_method"], table["moe_quant_algo"]) == ("fp8", "NVFP4")
    convert(plan(tmp_path / "v4", Recipe("nvfp4", layout="modelopt")), tmp_path / "whole")
    out, whole = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "whole"))
    assert out == whole
    with pytest.raises(KconvertError, match="no engine reads beside the FP8 that stays"):
        plan(tmp_path / "v4", by(rules.replace("'*'", "'shared' = 'bf16'\n'*'")))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group_size": 64}, "--group-size 64 is for INT4, of which {} writes none"),
        ({"convention": "compressed-tensors"}, "--convention compressed-tensors is for INT4, of which {} writes none"),
        ({"scales": "mse"}, "scales by mse are not for {}"),
    ],
)
def test_options_that_nothing_takes_are_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    for to in ("bf16", "gguf", "mlx", "int8"):
        with pytest.raises(KconvertError, match=sentence.format(f"--to {to}")):
            Recipe(to, **options)
    with pytest.raises(KconvertError, match=sentence.format("the recipe")):
        by("[encodings]\n'expert' = 'int8'\n'attention' = 'keep'", **options)
    assert by("[encodings]\n'expert' = 'int4'", **options)


def test_a_recorded_recipe_is_toml_whatever_its_globs_are() -> None:
    mix = parse_mix("[encodings]\n'*\U0001f600\"*' = 'fp8'", "a recipe")
    assert parse_mix(mix.text, "its record") == mix


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KconvertError, match=r"cannot read the recipe .*the presets are nvfp4, nvfp4-fp8-attention"):
        read_mix(tmp_path / "none.toml")


def test_patterns_hit_what_is_meant_and_nothing_else() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(1, 12)]
    others = ["model.layers.0.mlp.up_proj", "mtp.layers.1.mlp.up_proj", "lm_head"]
    (pattern,) = patterns(names, others)
    assert all(match_name(name, pattern) for name in names)
    assert not any(match_name(name, pattern) for name in others)
    assert all(match_name(name.replace("model.", "model.language_model.", 1), pattern) for name in names)
    assert patterns(["a.0.b.1.c"], ["a.0.b.2.c"]) == [r"re:(model\.|language_model\.)*a\.0\.b\.1\.c$"]


def test_the_command_takes_a_recipe_or_a_target(int4: Path, tmp_path: Path, kconvert: Any) -> None:
    (tmp_path / "mine.toml").write_text('[encodings]\nexpert = "nvfp4"\n')
    done = kconvert("convert", int4, tmp_path / "out", "--recipe", tmp_path / "mine.toml", "--layout", "modelopt")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "hf_quant_config.json").exists()
    dry = kconvert("convert", int4, tmp_path / "dry", "--recipe", "nvfp4-fp8-attention", "--dry-run")
    assert "recipe: compressed-tensors: expert = nvfp4, attention = fp8" in dry.stdout
    for arguments in ([], ["--to", "bf16", "--recipe", "nvfp4"]):
        wrong = kconvert("convert", int4, tmp_path / "no", *arguments)
        assert (wrong.returncode, "give either --to or --recipe" in wrong.stderr) == (2, True)
    layout = kconvert("convert", int4, tmp_path / "no", "--recipe", "nvfp4", "--layout", "experts")
    assert (layout.returncode, "layout is 'experts'" in layout.stderr) == (2, True)
    attention = kconvert("convert", int4, tmp_path / "no", "--to", "int4", "--attention", "fp8")
    assert "attention as 'fp8' is not possible for int4; for nvfp4 it is bf16 or fp8" in attention.stderr
