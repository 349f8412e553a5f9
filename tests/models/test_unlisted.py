"""Checkpoints whose names are not those that the manifest of their model lists."""

import pytest

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.report.summary import find

EXPERT = "model.layers.1.mlp.experts.2.gate_proj"


@pytest.fixture
def checkpoint(raw, int4_copy):
    return raw.load(int4_copy)


def rename(checkpoint, change):
    for tensors in checkpoint.files.values():
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)
    return checkpoint.save()


def test_buffers_that_engines_compute_are_read_past(raw, checkpoint, tmp_path):
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        checkpoint.put(name, raw.Tensor("F32", [32], bytes(128)))
    source = checkpoint.save()
    model = inspect(source)
    assert model.manifest.name == "kimi-k2-thinking"
    assert not find(model)
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")


@pytest.mark.parametrize("number", ["1²2", "٣", "9" * 5000], ids=["superscript", "Arabic", "endless"])
@pytest.mark.parametrize("model_type", ["kimi_k2", "unheard_of"])
def test_names_may_have_numbers_of_any_kind(raw, checkpoint, tmp_path, number, model_type):
    checkpoint.config["model_type"] = model_type
    name = f"model.layers.{number}.mlp.experts.{number}.gate_proj.weight"
    checkpoint.put(name, raw.Tensor("BF16", [2, 2], bytes(8)))
    source = checkpoint.save()
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    assert name in list(raw.load(tmp_path / "dst"))


def test_more_tensors_than_the_manifest_lists_are_copied_and_told_of(raw, checkpoint, tmp_path):
    checkpoint.put("model.layers.1.mlp.surprise.weight", raw.Tensor("BF16", [2], bytes(4)))
    checkpoint.put(f"{EXPERT}.bias", raw.Tensor("BF16", [128], bytes(256)))
    source = checkpoint.save()
    (finding,) = find(inspect(source))
    assert "and 1 more not listed in the manifest kimi-k2-thinking" in finding
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    assert "model.layers.1.mlp.surprise.weight" in list(raw.load(tmp_path / "dst"))


def test_a_quantised_weight_that_the_manifest_does_not_list_is_decoded(raw, checkpoint, tmp_path):
    for part in ("packed", "scale", "shape"):
        checkpoint.put(f"mtp.layers.0.eh_proj.weight_{part}", checkpoint[f"{EXPERT}.weight_{part}"])
    source = checkpoint.save()
    (weight,) = (weight for weight in inspect(source).weights if weight.name == "mtp.layers.0.eh_proj")
    assert (weight.role, weight.format.label) == ("mtp", "int4 group 32")
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    assert raw.load(tmp_path / "dst")["mtp.layers.0.eh_proj.weight"].shape == [128, 256]


def test_an_embedding_may_be_quantised(raw, checkpoint, tmp_path):
    config = checkpoint.config["quantization_config"]
    config["config_groups"]["group_0"]["targets"].append("re:.*embed_tokens")
    checkpoint.pop("model.embed_tokens.weight")
    parts = {"packed": ("I32", [512, 32], 4), "scale": ("BF16", [512, 8], 2)}
    for part, (dtype, shape, width) in parts.items():
        data = bytes(shape[0] * shape[1] * width)
        checkpoint.put(f"model.embed_tokens.weight_{part}", raw.Tensor(dtype, shape, data))
    # A scale of zero goes with codes of zero only, which are stored as eights.
    checkpoint["model.embed_tokens.weight_packed"].data = b"\x88" * (512 * 32 * 4)
    source = checkpoint.save()
    (weight,) = (weight for weight in inspect(source).weights if weight.name == "model.embed_tokens")
    assert (weight.role, weight.rows, weight.cols) == ("embedding", 512, 256)
    convert(plan(source, Recipe("fp8")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    assert raw.load(tmp_path / "dst")["model.embed_tokens.weight"].dtype == "BF16"


def test_a_model_whose_weights_have_other_names_is_read_by_these(checkpoint, tmp_path):
    source = rename(checkpoint, lambda name: name.replace(".mlp.experts.", ".block_sparse_moe.experts."))
    model = inspect(source)
    assert model.manifest.name == "generic"
    assert any("other names than the manifest kimi-k2-thinking knows" in finding for finding in find(model))
    assert {w.role for w in model.weights if w.expert is not None} == {"expert.gate", "expert.up", "expert.down"}
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")


def test_a_missing_weight_is_missed_though_there_are_others_that_nobody_lists(raw, checkpoint):
    for part in ("packed", "scale", "shape"):
        checkpoint.pop(f"{EXPERT}.weight_{part}")
    checkpoint.put("surprise", raw.Tensor("BF16", [2], bytes(4)))
    with pytest.raises(KconvertError, match=f"'{EXPERT}' missing"):
        inspect(checkpoint.save())


@pytest.mark.parametrize(
    ("change", "wrapper"),
    [
        (lambda name: f"_orig_mod.{name}", "'_orig_mod'"),
        (lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."), "_checkpoint_wrapped_module"),
        (lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."), "_fsdp_wrapped_module"),
        (lambda name: f"module.{name}", "'module'"),
        (lambda name: f"base_model.model.{name}", "'base_model.model'"),
        (lambda name: name.replace("q_a_proj.", "q_a_proj.base_layer."), "'base_layer'"),
    ],
)
@pytest.mark.parametrize("model_type", ["kimi_k2", "unheard_of"])
def test_names_of_wrapped_modules_are_named_as_what_they_are(checkpoint, change, wrapper, model_type):
    checkpoint.config["model_type"] = model_type
    with pytest.raises(KconvertError, match="wrapped") as caught:
        inspect(rename(checkpoint, change))
    assert wrapper in str(caught.value)


@pytest.mark.parametrize("suffix", ["k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "kv_scale"])
@pytest.mark.parametrize("place", ["self_attn", "self_attn.attn", "self_attn.kv_a_proj_with_mqa"])
@pytest.mark.parametrize("model_type", ["kimi_k2", "unheard_of"])
def test_scales_of_the_cache_are_left_behind_wherever_they_stand(raw, checkpoint, tmp_path, suffix, place, model_type):
    checkpoint.config["model_type"] = model_type
    name = f"model.layers.1.{place}.{suffix}"
    checkpoint.put(name, raw.Tensor("F32", [1], b"\0\0\x80\x7f"))
    source = checkpoint.save()
    assert [tensor.name for tensor in inspect(source).dropped] == [name]
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    assert name not in list(raw.load(tmp_path / "dst"))


def test_only_routed_experts_go_to_int4_whatever_the_model(raw, tmp_path):
    """A model in FP8 throughout that no manifest knows: attention, shared experts and MTP stay what they are, in BF16."""
    from kconvert.targets.sample import SampleRecipe, plan_synthetic

    sizes = {
        "layers": 2,
        "dense_layers": 1,
        "experts": 2,
        "hidden": 256,
        "intermediate": 256,
        "moe_intermediate": 128,
        "vocab": 128,
    }
    convert(plan_synthetic(SampleRecipe("deepseek-v3", {**sizes, "heads": 4, "q_rank": 64})), tmp_path / "src")
    checkpoint = raw.load(tmp_path / "src")
    checkpoint.config["model_type"] = "unheard_of"
    source = rename(checkpoint, lambda name: name.replace("model.layers.2.", "mtp.layers.0."))
    made = plan(source, Recipe("int4", source="fp8"))
    packed = {name for shard in made.shards for name in shard.tensors if name.endswith("weight_packed")}
    assert packed
    assert all(".mlp.experts." in name and not name.startswith("mtp.") for name in packed)


def test_a_bf16_model_that_no_manifest_knows_has_its_experts_found_by_name(raw, bf16_copy, tmp_path):
    checkpoint = raw.load(bf16_copy)
    checkpoint.config["model_type"] = "unheard_of"
    source = checkpoint.save()
    convert(plan(source, Recipe("int4")), tmp_path / "int4")
    convert(plan(tmp_path / "int4", Recipe("bf16")), tmp_path / "again")
    verify(source, tmp_path / "int4")
    verify(source, tmp_path / "again")
    assert f"{EXPERT}.weight_packed" in list(raw.load(tmp_path / "int4"))


def test_a_fake_quantised_checkpoint_goes_to_bf16_as_a_clean_copy(raw, bf16_copy, tmp_path):
    """The BF16 weight is the value, the scale beside it and the declaration say nothing."""
    checkpoint = raw.load(bf16_copy)
    checkpoint.put(f"{EXPERT}.weight_scale", raw.Tensor("BF16", [128, 8], bytes(128 * 8 * 2)))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    checkpoint.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    source = checkpoint.save()
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    written = raw.load(tmp_path / "dst")
    assert "quantization_config" not in written.config
    assert f"{EXPERT}.weight_scale" not in list(written)
    assert written[f"{EXPERT}.weight"].data == checkpoint[f"{EXPERT}.weight"].data


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_model_whose_config_json_lacks_a_size_is_read_by_its_names_and_says_so(raw, int4_copy, tmp_path, to):
    checkpoint = raw.load(int4_copy)
    del checkpoint.config["kv_lora_rank"]
    source = checkpoint.save()
    model = inspect(source)
    assert model.findings[0].startswith("config.json: kv_lora_rank is missing, but the manifest kimi-k2-thinking needs")
    assert "expert.gate" in {weight.role for weight in model.weights}
    convert(plan(source, Recipe(to)), tmp_path / "dst")
    verify(source, tmp_path / "dst")
