import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.address import open_checkpoint
from kconvert.models.catalogue import load_manifest
from kconvert.targets.sample import SampleRecipe, plan_cut, plan_synthetic

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"


@pytest.fixture(scope="module")
def tensors(raw, int4):
    return raw.load(int4)


def codes_and_scales(tensors, name):
    """Codes [groups, 32] and scales [groups], unpacked without the product's code."""
    stored = np.frombuffer(tensors[f"{name}.weight_packed"].data, np.uint8)
    codes = np.stack([stored & 15, stored >> 4], axis=1).astype(np.int8) - 8
    scale = torch.frombuffer(bytearray(tensors[f"{name}.weight_scale"].data), dtype=torch.bfloat16)
    return codes.reshape(-1, 32), scale.float().numpy()


def all_groups(tensors):
    names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    codes, scales = zip(*(codes_and_scales(tensors, name) for name in names), strict=True)
    return np.concatenate(codes), np.concatenate(scales)


def test_every_group_that_is_not_zero_has_a_code_of_seven(tensors):
    codes, scales = all_groups(tensors)
    assert (np.abs(codes).max(axis=1) == 7)[scales != 0].all()
    assert codes.min() == -7


def test_some_groups_are_all_zero_with_scale_zero(tensors):
    codes, scales = all_groups(tensors)
    zero = scales == 0
    assert 0.001 < zero.mean() < 0.05
    assert (codes[zero] == 0).all()
    assert (scales >= 0).all()


def test_the_weights_are_heavy_tailed(tensors):
    """Student's t with 4 degrees of freedom passes 6 standard deviations now and then; a normal never does."""
    weight = torch.frombuffer(bytearray(tensors["lm_head.weight"].data), dtype=torch.bfloat16).float()
    assert 1 <= (weight.abs() > 6 * weight.std()).sum() < len(weight) / 500


def test_names_dtypes_and_shapes_are_the_manifests(tensors):
    expected = {}
    for name, match in load_manifest("kimi-k2-thinking").bind(tensors.config).expected():
        if match.rule.dtype is not None:
            expected[name] = (match.rule.dtype, list(match.shape))
        elif match.rule.role.startswith("expert."):
            rows, cols = match.shape
            expected[f"{name}.weight_packed"] = ("I32", [rows, cols // 8])
            expected[f"{name}.weight_scale"] = ("BF16", [rows, cols // 32])
            expected[f"{name}.weight_shape"] = ("I32", [2])
        else:
            expected[f"{name}.weight"] = ("BF16", list(match.shape))
    assert {name: (tensors[name].dtype, tensors[name].shape) for name in tensors} == expected


def test_weight_shape_says_rows_and_columns(tensors):
    data = tensors[EXPERT.format(0, "down") + ".weight_shape"].data
    assert np.frombuffer(data, np.int32).tolist() == [256, 128]


def test_the_config_is_the_published_one_but_for_the_sizes(tensors):
    published = load_manifest("kimi-k2-thinking").config
    changed = {key for key, value in published.items() if tensors.config[key] != value}
    assert tensors.config.keys() == published.keys()
    assert changed == {
        "num_hidden_layers",
        "n_routed_experts",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "num_attention_heads",
        "num_key_value_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "num_experts_per_tok",
    }
    assert tensors.config["num_experts_per_tok"] == 4


def test_side_files_and_shard_names_are_the_published_ones(int4):
    names = {str(path.relative_to(int4)) for path in int4.rglob("*") if path.is_file()}
    assert load_manifest("kimi-k2-thinking").side_files.keys() <= names
    count = len(list(int4.glob("*.safetensors")))
    assert f"model-00001-of-{count:06d}.safetensors" in names


def test_the_router_bias_is_not_exact_in_bf16(tensors):
    values = np.frombuffer(tensors["model.layers.1.mlp.gate.e_score_correction_bias"].data, np.uint32)
    assert (values & 0xFFFF).any()


def test_the_same_seed_gives_the_same_bytes(sample, int4, tree, tmp_path):
    assert tree(sample(tmp_path / "again")) == tree(int4)


def test_another_seed_gives_other_weights_in_the_same_places(sample, tensors, tmp_path, raw):
    other = raw.load(sample(tmp_path / "other", seed=1))
    assert {file: list(content) for file, content in other.files.items()} == {
        file: list(content) for file, content in tensors.files.items()
    }
    same = [name for name in other if other[name].data == tensors[name].data]
    assert Counter(name.rpartition(".")[2] for name in same) == {"weight_shape": 24}


def test_no_two_weights_of_a_sample_are_the_same(tensors):
    data = [tensors[name].data for name in tensors if name.endswith(("weight_packed", "proj.weight"))]
    assert len(set(data)) == len(data)


def test_scattering_moves_tensors_and_changes_none(scattered, tensors, raw):
    found = raw.load(scattered)
    assert {name: found[name] for name in found} == {name: tensors[name] for name in tensors}
    name = EXPERT.format(0, "gate")
    assert len({found.file_of(f"{name}.weight_{part}") for part in ("packed", "scale", "shape")}) == 3


def test_scattering_into_a_single_shard_is_refused():
    with pytest.raises(KconvertError, match="nothing to scatter"):
        plan_synthetic(SampleRecipe(sizes={"layers": 2, "experts": 2}, shard_size=10**12, scatter=True))


@pytest.fixture(scope="module")
def cut(int4, tmp_path_factory):
    root = tmp_path_factory.mktemp("cut") / "cut"
    sizes = {"layers": 2, "experts": 3}
    convert(plan_cut(open_checkpoint(int4), SampleRecipe(sizes=sizes, shard_size=500_000)), root)
    return root


def test_a_cut_holds_the_first_layers_and_experts_byte_for_byte(cut, tensors, raw):
    found = raw.load(cut)
    kept = [
        name
        for name in tensors
        if not name.startswith("model.layers.2.") and ".experts.3." not in name and ".mlp.gate." not in name
    ]
    routers = ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
    assert set(found) == {*kept, *routers}
    assert {name: found[name] for name in kept} == {name: tensors[name] for name in kept}


def test_a_cut_keeps_the_routers_rows_of_the_experts_that_stay(cut, tensors, raw):
    found = raw.load(cut)
    for name, width in (
        ("model.layers.1.mlp.gate.weight", 2 * 256),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 4),
    ):
        assert found[name].shape == [3, *tensors[name].shape[1:]]
        assert found[name].data == tensors[name].data[: 3 * width]


def test_the_config_of_a_cut_differs_in_layers_and_experts_only(cut, tensors):
    config = json.loads((cut / "config.json").read_text())
    expected = {**tensors.config, "num_hidden_layers": 2, "n_routed_experts": 3, "num_experts_per_tok": 3}
    assert config == expected
    assert list(config) == list(tensors.config)


def test_a_cut_takes_the_side_files_along(cut, int4):
    assert (cut / "docs" / "deploy_guidance.md").read_bytes() == (int4 / "docs" / "deploy_guidance.md").read_bytes()


def test_a_cut_converts_and_verifies(cut, tmp_path):
    convert(plan(cut, Recipe("bf16", source="int4")), tmp_path / "dst")
    assert verify(cut, tmp_path / "dst").weights == len(inspect(cut).weights)


def test_a_cut_without_sizes_is_a_copy(int4, tensors, tmp_path, raw):
    convert(plan_cut(open_checkpoint(int4), SampleRecipe()), tmp_path / "copy")
    found = raw.load(tmp_path / "copy")
    assert {name: found[name] for name in found} == {name: tensors[name] for name in tensors}
    assert found.config == tensors.config


@pytest.mark.parametrize("symbol", ["hidden", "vocab", "heads", "moe_intermediate", "q_rank"])
def test_what_cannot_be_cut_out_of_real_weights_is_refused(int4, symbol):
    with pytest.raises(KconvertError, match=f"--{symbol.replace('_', '-')} cannot be cut"):
        plan_cut(open_checkpoint(int4), SampleRecipe(sizes={symbol: 2}))


@pytest.mark.parametrize(("symbol", "size"), [("layers", 4), ("experts", 5), ("dense_layers", 2)])
def test_more_than_there_is_cannot_be_cut(int4, symbol, size):
    with pytest.raises(KconvertError, match=f"--{symbol.replace('_', '-')} {size} is more than"):
        plan_cut(open_checkpoint(int4), SampleRecipe(sizes={symbol: size}))


def test_other_dense_layers_than_the_checkpoints_cannot_be_cut(int4):
    with pytest.raises(KconvertError, match=r"has no tensor of 'model\.layers\.0\.mlp"):
        plan_cut(open_checkpoint(int4), SampleRecipe(sizes={"dense_layers": 0}))


def test_a_model_that_no_manifest_knows_cannot_be_cut(raw, int4_copy):
    checkpoint = raw.load(int4_copy)
    checkpoint.config["model_type"] = "nobody"
    with pytest.raises(KconvertError, match="no manifest knows this model"):
        plan_cut(open_checkpoint(checkpoint.save()), SampleRecipe(sizes={"layers": 1}))


def test_a_weight_that_lacks_a_part_cannot_be_cut(raw, int4_copy):
    checkpoint = raw.load(int4_copy)
    name = EXPERT.format(0, "gate")
    checkpoint.pop(f"{name}.weight_scale")
    with pytest.raises(KconvertError, match=name.replace(".", r"\.")):
        plan_cut(open_checkpoint(checkpoint.save()), SampleRecipe(sizes={"layers": 2}))


@pytest.mark.parametrize("sizes", [{"hidden": 100}, {"moe_intermediate": 48}], ids=str)
def test_a_size_that_gives_ragged_groups_is_refused_with_the_weight(sizes):
    with pytest.raises(KconvertError, match=r"weight 'model\.layers\.1\.mlp\.experts"):
        plan_synthetic(SampleRecipe(sizes={"layers": 2, "experts": 2, **sizes}))


@pytest.mark.parametrize(("sizes", "experts"), [({"layers": 1}, 0), ({"dense_layers": 0}, 36), ({"experts": 1}, 6)])
def test_extreme_sizes_make_checkpoints_that_are_understood(sample, tmp_path, sizes, experts):
    model = inspect(sample(tmp_path / "x", **sizes))
    assert len([weight for weight in model.weights if weight.role.startswith("expert.")]) == experts


@pytest.mark.parametrize("symbol", ["experts", "hidden", "vocab", "heads", "layers"])
def test_a_size_of_zero_makes_a_sound_checkpoint_or_is_refused(sample, tmp_path, symbol):
    try:
        root = sample(tmp_path / "x", **{symbol: 0})
    except KconvertError:
        assert not (tmp_path / "x").exists()
    else:
        inspect(root)


def test_a_sample_is_read_by_transformers_as_its_model_type(int4, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copy(int4 / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("auto_map"), config.update(model_type="deepseek_v3")
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (read.num_hidden_layers, read.n_routed_experts, read.hidden_size) == (3, 4, 256)
