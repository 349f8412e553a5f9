"""`kconvert sample --like NAME` makes every family, and what it makes is understood, cut smaller and converted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.address import open_checkpoint
from kconvert.formats.dense import Dense
from kconvert.models.catalogue import load_manifest, load_manifests
from kconvert.models.sizes import lookup
from kconvert.report.summary import summarise
from kconvert.targets.amx import AmxRecipe, plan_repack
from kconvert.targets.base import HELD
from kconvert.targets.sample import SampleRecipe, plan_cut, plan_synthetic

FAMILIES = sorted(set(load_manifests()) - {"generic"})
QUANTISED = [
    *(
        "deepseek-v3",
        "deepseek-v3.2",
        "deepseek-v4",
        "deepseek-v4-0731",
        "deepseek-v4-base",
        "deepseek-v4.1",
        "glm-5.3",
    ),
    *("gpt-oss", "kimi-k2-instruct", "kimi-k2-thinking", "kimi-k2.5", "kimi-k3", "ling-3", "minimax-m2", "minimax-m3"),
    *("qwen3.5-moe-fp8", "kimi-k2-thinking-nvfp4"),
]
# Which have scales of activations.
MEASURED = {"kimi-k2-thinking-nvfp4"}
# Config.json does not tell these apart.
READ_AS = {
    **dict.fromkeys(("kimi-k2.6", "kimi-k2.7"), "kimi-k2.5"),
    **dict.fromkeys(("deepseek-v4-0731", "deepseek-v4-base"), "deepseek-v4"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_recognised_and_sound(small_sample: Callable[[str], Path], name: str) -> None:
    model = inspect(small_sample(name))
    assert model.manifest.name == READ_AS.get(name, name)
    findings = summarise(model).facts["findings"]
    assert all("input_scale) say nothing of a weight" in finding for finding in findings)
    assert bool(findings) == (name in MEASURED)
    assert {weight.role.partition(".")[0] for weight in model.weights} >= {"lm_head"}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"ling-3"}))
def test_a_cut_has_the_first_layers_and_experts_and_a_config_that_says_so(
    small_sample: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    source = open_checkpoint(small_sample(name))
    convert(plan_cut(source, SampleRecipe(sizes={"layers": 2, "experts": 2})), tmp_path / "cut")
    model = inspect(tmp_path / "cut")
    section = model.manifest.section(model.checkpoint.config)
    assert lookup(section, model.manifest.dims["layers"]) == 2
    assert lookup(section, model.manifest.dims["experts"]) == 2
    assert {weight.layer for weight in model.weights} == {None, 0, 1}
    assert {weight.expert for weight in model.weights} <= {None, 0, 1}


def test_layers_that_come_in_groups_are_cut_in_groups(small_sample: Callable[[str], Path]) -> None:
    source = open_checkpoint(small_sample("ling-3"))
    assert plan_cut(source, SampleRecipe(sizes={"layers": 4, "experts": 2})).steps
    with pytest.raises(KconvertError, match=r"no tensor of 'model\.layers\.1\.attention.* other kinds"):
        plan_cut(source, SampleRecipe(sizes={"layers": 2}))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_sample_converts_to_bf16_and_is_proved_equal(
    small_sample: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    source = small_sample(name)
    convert(plan(source, Recipe("bf16")), tmp_path / "bf16")
    model = inspect(tmp_path / "bf16")
    assert all(isinstance(weight.format, Dense) or weight.role in HELD for weight in model.weights)
    assert verify(source, tmp_path / "bf16").weights == len(model.weights)


def test_a_table_of_experts_names_those_that_there_are_also_in_a_cut(
    small_sample: Callable[[str], Path], raw: Any, tmp_path: Path
) -> None:
    source, cut = small_sample("deepseek-v4-base"), tmp_path / "cut"
    convert(plan_cut(open_checkpoint(source), SampleRecipe(sizes={"layers": 2, "experts": 2})), cut)
    for directory, experts, count in ((source, 4, 3), (cut, 2, 2)):
        tensors = raw.load(directory)
        tables = [tensors[name] for name in tensors if name.endswith(".tid2eid")]
        assert len(tables) == count
        for table in tables:
            rows = torch.frombuffer(bytearray(table.data), dtype=torch.int64).view(*table.shape)
            assert (list(rows.shape), set(rows.unique().tolist())) == ([512, experts], set(range(experts)))
            assert all(len(row.unique()) == experts for row in rows)


@pytest.mark.parametrize(("dtype", "size"), [("I64", 8), ("I32", 4)])
@pytest.mark.parametrize("expert", [-1, 4, 1 << 30])
def test_a_table_that_names_an_expert_that_there_is_not_is_refused(
    small_sample: Callable[[str], Path], tmp_path: Path, raw: Any, dtype: str, size: int, expert: int
) -> None:
    damaged = raw.load(small_sample("deepseek-v4"))
    name = "layers.1.ffn.gate.tid2eid"
    table = damaged[name]
    numbers = [0] * (table.shape[0] * table.shape[1])
    numbers[table.shape[1] + 1] = expert
    table.dtype, table.data = dtype, b"".join(n.to_bytes(size, "little", signed=True) for n in numbers)
    source = damaged.save(tmp_path / "damaged")
    said = re.escape(f"tensor '{name}' is {expert} at [1, 1], but there are experts 0 to 3; the file is damaged")
    for made in (plan(source, Recipe("bf16")), plan_repack(inspect(source), AmxRecipe("AMXINT8", 1, with_rest=True))):
        with pytest.raises(KconvertError, match=rf"^model-0.*safetensors: {said}"):
            convert(made, tmp_path / made.hash)
        assert not (tmp_path / made.hash / "config.json").exists()


def test_numbers_of_heads_that_there_are_not_are_zero(small_sample: Callable[[str], Path], raw: Any) -> None:
    decay = raw.load(small_sample("kimi-k3"))["language_model.model.layers.0.self_attn.A_log"]
    values = torch.frombuffer(bytearray(decay.data), dtype=torch.float32)
    assert (values[:4] != 0).all()
    assert (values[4:] == 0).all()
    assert len(values) == 128


@pytest.mark.parametrize(("name", "stacked"), [("qwen3.5-moe", True), ("qwen3.5-moe-fp8", False), ("step-3", True)])
def test_experts_lie_as_they_are_published(
    small_sample: Callable[[str], Path], tmp_path: Path, name: str, stacked: bool
) -> None:
    cut = tmp_path / "cut"
    convert(plan_cut(open_checkpoint(small_sample(name)), SampleRecipe(sizes={"layers": 4, "experts": 2})), cut)
    for directory, experts in ((small_sample(name), 4), (cut, 2)):
        checkpoint = open_checkpoint(directory)
        stacks = load_manifest(name).bind(checkpoint.config).stacks
        assert stacks
        for stack in stacks.values():
            tensor = checkpoint.tensors.get(stack.name if stack.bare else f"{stack.name}.weight")
            assert (tensor is not None) == stacked
            if tensor is not None:
                assert tensor.shape[0] == experts
            assert all((f"{member}.weight" in checkpoint.tensors) != stacked for member in stack.members)


@pytest.mark.parametrize("to", ["fp8", "int4", "int8", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("name", ["qwen3.5-moe", "step-3"])
def test_experts_of_a_stack_can_be_read_in_every_encoding_that_is_written(
    small_sample: Callable[[str], Path], tmp_path: Path, name: str, to: str
) -> None:
    source = small_sample(name)
    convert(plan(source, Recipe(to)), tmp_path / "out")
    verify(source, tmp_path / "out")


def test_an_mtp_layer_is_cut_with_its_model_whole_or_left_out_with_its_last_layers(
    small_sample: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(small_sample("glm-4-moe"))
    whole = plan_cut(source, SampleRecipe(sizes={"experts": 2}))
    cut = plan_cut(source, SampleRecipe(sizes={"layers": 3}))
    assert any(step.name == "model.layers.4.eh_proj.weight" for step in whole.steps)
    assert not any("eh_proj" in step.name for step in cut.steps)
    assert json.loads(cut.texts["config.json"])["num_nextn_predict_layers"] == 0


def test_a_cut_takes_along_what_nobody_knows_of_the_vision_tower(
    small_sample: Callable[[str], Path], raw: Any, tmp_path: Path
) -> None:
    damaged = raw.load(small_sample("kimi-k2.5"))
    damaged.put("vision_tower.of_another_kind.weight", raw.Tensor("BF16", [3], bytes(6)))
    source = open_checkpoint(damaged.save(tmp_path / "source"))
    cut = plan_cut(source, SampleRecipe(sizes={"layers": 2}))
    names = {step.name for step in cut.steps}
    assert "vision_tower.of_another_kind.weight" in names
    assert "vision_tower.encoder.blocks.1.norm0.weight" in names
    assert "vision_tower.encoder.blocks.2.norm0.weight" not in names


def test_the_language_model_of_a_nested_sample_is_quantised_as_the_lone_one_is(
    small_sample: Callable[[str], Path],
) -> None:
    nested, lone = inspect(small_sample("kimi-k2.5")), inspect(small_sample("kimi-k2-thinking"))
    assert {w.name.removeprefix("language_model."): w.format for w in nested.weights} == {
        w.name: w.format for w in lone.weights
    }
    assert "quantization_config" in nested.checkpoint.config["text_config"]


def test_a_bf16_copy_of_a_nested_model_declares_no_quantisation_anywhere(
    small_sample: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(plan(small_sample("kimi-k2.5"), Recipe("bf16")), tmp_path / "bf16")
    assert "quantization_config" not in (tmp_path / "bf16" / "config.json").read_text()


def test_a_dimension_that_the_family_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(KconvertError, match="mixtral has no q_rank; it has layers, "):
        plan_synthetic(SampleRecipe("mixtral", {"q_rank": 8}))


def test_the_generic_manifest_has_no_sample() -> None:
    with pytest.raises(KconvertError, match="describes no checkpoint of its own"):
        plan_synthetic(SampleRecipe("generic"))


def test_any_other_model_is_taken_as_it_says_it_is(
    small_sample: Callable[[str], Path], raw: Any, tmp_path: Path
) -> None:
    unknown = raw.load(small_sample("kimi-k2-thinking"))
    unknown.config["model_type"] = "a_new_one"
    source = unknown.save(tmp_path / "source")
    model = inspect(source)
    assert model.manifest.name == "generic"
    assert len(model.weights) == sum(name.endswith("weight_packed") for name in model.checkpoint.tensors)
    assert "model.layers.0.self_attn.o_proj.weight" in {plain.tensor.name for plain in model.plain}
    convert(plan(source, Recipe("bf16")), tmp_path / "bf16")
    assert verify(source, tmp_path / "bf16").weights == len(model.weights)


def test_token_ids_stay_within_a_smaller_vocabulary() -> None:
    manifest = load_manifest("kimi-k2-thinking")
    assert manifest.resize(manifest.config, {"vocab": 512})["pad_token_id"] == 511
    assert manifest.resize(manifest.config, {"layers": 2})["pad_token_id"] == 163839


def test_a_limit_adds_nothing_that_config_json_does_not_have() -> None:
    manifest = load_manifest("gpt-oss")
    config = {key: value for key, value in manifest.config.items() if key not in ("experts_per_token", "layer_types")}
    resized = manifest.resize(config, {"layers": 2, "experts": 2})
    assert resized == {**config, "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
