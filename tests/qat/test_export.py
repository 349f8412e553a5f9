"""The exported checkpoint has the values that training saw."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import kconvert
from kconvert.address import open_checkpoint
from kconvert.errors import KconvertError
from kconvert.formats.reference import packed as reference
from kconvert.targets.sample import SampleRecipe, plan_synthetic
from kconvert_qat import QATConfig, coverage, export, prepare
from kconvert_qat.attach import attached_to
from kconvert_qat.export import plan_export
from kconvert_qat.names import check_grid


def load(folder, dtype=torch.bfloat16, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def load_int4(folder):
    from transformers import CompressedTensorsConfig

    return load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


@pytest.fixture(params=["kimi", "compressed-tensors"])
def config(request):
    return QATConfig(convention=request.param)


@pytest.mark.parametrize("name", ["deepseek", "qwen", "mixtral"])
def test_transformers_computes_the_trainers_logits_from_the_export(tiny, name, ids, tmp_path, config):
    model = tiny(name)
    prepare(model, config)
    export(model, tmp_path / "int4")
    assert torch.equal(load_int4(tmp_path / "int4")(ids).logits, model(ids).logits)


def test_the_export_goes_through_int4_to_bf16_with_the_same_logits_and_verifies(tiny, ids, tmp_path):
    model = tiny()
    prepare(model)
    export(model, tmp_path / "int4")
    model.save_pretrained(tmp_path / "masters")
    kconvert.convert(kconvert.plan(tmp_path / "int4", kconvert.Recipe("bf16", "int4")), tmp_path / "bf16")
    assert torch.equal(load(tmp_path / "bf16")(ids).logits, model(ids).logits)
    assert kconvert.verify(tmp_path / "int4", tmp_path / "bf16").weights
    assert kconvert.verify(tmp_path / "masters", tmp_path / "int4").weights


def test_bf16_to_int4_of_the_masters_writes_the_same_tensors(tiny, tmp_path):
    model = tiny()
    prepare(model)
    export(model, tmp_path / "int4")
    model.save_pretrained(tmp_path / "masters")
    kconvert.convert(kconvert.plan(tmp_path / "masters", kconvert.Recipe("int4")), tmp_path / "converted")
    ours, theirs = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("int4", "converted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_f32_masters_are_served_as_their_bf16_casts_are(tiny, ids, tmp_path):
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0009)
    covered = prepare(model)
    export(model, tmp_path / "int4")
    files = load_file(tmp_path / "int4" / "model-00001-of-00001.safetensors")
    for matrix in covered.matrices:
        packed, scale = files[f"{matrix.name}.weight_packed"], files[f"{matrix.name}.weight_scale"]
        served = attached_to(matrix.weight.module).serve(matrix.weight.module, matrix.weight.parameter)
        assert torch.equal(reference.decode(packed, scale, matrix.weight.shape[1]).float(), matrix.of(served))


def test_experts_that_have_biases_are_exported_with_them_one_by_one(tiny, tmp_path, monkeypatch):
    model = tiny("gpt-oss")
    monkeypatch.setattr(type(model.config), "model_type", "one_by_one")  # without a manifest, which has them stacked
    prepare(model)
    export(model, tmp_path / "int4", for_transformers=False)
    files = load_file(tmp_path / "int4" / "model-00001-of-00001.safetensors")
    experts, name = model.model.layers[0].mlp.experts, "model.layers.0.mlp.experts.2.up_proj"
    weight = reference.decode(files[f"{name}.weight_packed"], files[f"{name}.weight_scale"], 64)
    assert torch.equal(weight, attached_to(experts).serve(experts, "gate_up_proj")[2, :, 1::2].T)
    assert torch.equal(files[f"{name}.bias"], experts.gate_up_proj_bias[2, 1::2])


@pytest.fixture(scope="module")
def kimi_linear(tmp_path_factory):
    """A Kimi-Linear checkpoint; its first layer is dense and is called `mlp`, and the experts' layers `block_sparse_moe`."""
    sizes = {
        "layers": 4,
        "experts": 4,
        "hidden": 64,
        "intermediate": 64,
        "moe_intermediate": 32,
        "vocab": 128,
        "heads": 4,
    }
    root = tmp_path_factory.mktemp("kimi-linear") / "bf16"
    kconvert.convert(plan_synthetic(SampleRecipe("kimi-linear", sizes)), root)
    config = json.loads((root / "config.json").read_text())
    del config["auto_map"]
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("with_source", [True, False])
def test_weights_keep_the_names_of_the_checkpoint_or_the_manifest_where_transformers_saves_others(
    kimi_linear, with_source, tmp_path
):
    model = load(kimi_linear)
    prepare(model)
    export(model, tmp_path / "int4", source=kimi_linear if with_source else None)
    written, before = open_checkpoint(tmp_path / "int4").tensors, open_checkpoint(kimi_linear).tensors
    packed = {name.replace("weight_packed", "weight") for name in written if name.endswith("weight_packed")}
    kept = {name for name in written if not name.endswith(("_packed", "_scale", "_shape"))}
    assert packed | kept == before.keys()
    assert "model.layers.0.mlp.down_proj.weight" in kept
    kconvert.convert(kconvert.plan(tmp_path / "int4", kconvert.Recipe("bf16")), tmp_path / "bf16")
    assert kconvert.verify(tmp_path / "int4", tmp_path / "bf16").weights
    assert open_checkpoint(tmp_path / "bf16").tensors.keys() == before.keys()


@pytest.mark.parametrize("target", ["expert.down", "model.layers.1.*"])
def test_an_export_of_some_experts_warns_that_transformers_loads_it_by_way_of_bf16_only(
    tiny, ids, tmp_path, target, caplog
):
    model = tiny("qwen")
    prepare(model, QATConfig(targets=(target,)))
    export(model, tmp_path / "int4")
    assert "`kconvert convert --to bf16` makes one" in caplog.text
    kconvert.convert(kconvert.plan(tmp_path / "int4", kconvert.Recipe("bf16")), tmp_path / "bf16")
    assert torch.equal(load(tmp_path / "bf16")(ids).logits, model(ids).logits)


def test_an_export_that_kconvert_could_not_read_is_refused_before_anything_is_written(tiny, tmp_path):
    model = tiny("deepseek")
    prepare(model)
    model.config.vocab_size += 8
    with pytest.raises(KconvertError, match=r"kconvert could not read the export.*\[128, 64\].*\[136, 64\]"):
        export(model, tmp_path / "int4", for_transformers=False)
    assert not (tmp_path / "int4").exists()


def test_checking_an_export_leaves_transformers_as_talkative_as_it_was(tiny):
    from transformers import logging

    model = tiny("qwen")
    prepare(model)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    plan_export(model)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_output_carries_the_configuration(tiny, tmp_path, config):
    model = tiny()
    prepare(model, config)
    export(model, tmp_path / "int4", shard_size=20_000)
    assert QATConfig.from_json((tmp_path / "int4" / "qat_config.json").read_text()) == config
    table = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert table["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert len(list((tmp_path / "int4").glob("*.safetensors"))) > 1
    check_grid({"quantization_config": table}, config, coverage(model).matrices)


def test_an_export_never_mixes_with_what_is_there(tiny, tmp_path):
    model = tiny()
    prepare(model)
    export(model, tmp_path / "int4")
    with pytest.raises(KconvertError, match="choose another directory"):
        export(model, tmp_path / "int4")
    export(model, tmp_path / "int4", overwrite=True)


def test_a_weight_that_is_not_finite_is_named_and_leaves_no_checkpoint(tiny, tmp_path):
    model = tiny()
    prepare(model)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    with pytest.raises(KconvertError, match=r"experts\.3\.down_proj.*not finite"):
        export(model, tmp_path / "int4")
    assert not (tmp_path / "int4" / "config.json").exists()
    assert not list((tmp_path / "int4").glob("*.safetensors"))


@pytest.mark.parametrize(("group", "message"), [(64, "as int4 group 32, but")])
def test_the_guard_refuses_another_grid(tiny, tmp_path, group, message):
    model = tiny()
    covered = prepare(model)
    export(model, tmp_path / "int4")
    table = json.loads((tmp_path / "int4" / "config.json").read_text())
    check_grid(table, QATConfig(), covered.matrices)
    with pytest.raises(KconvertError, match=message):
        check_grid(table, QATConfig(group_size=group), covered.matrices)
    table["quantization_config"]["ignore"] = ["re:.*down_proj"]
    with pytest.raises(KconvertError, match="not quantised"):
        check_grid(table, QATConfig(), covered.matrices)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (QATConfig(group_size=16), "as int4 group 32, but the QAT grid is int4 kimi group 16"),
        (QATConfig(grid="mxfp4"), "as int4 group 32, but the QAT grid is mxfp4"),
    ],
)
def test_an_export_on_a_grid_that_its_source_does_not_declare_is_refused_before_a_byte_is_written(
    tiny, tmp_path, trained, message
):
    model = tiny()
    prepare(model)
    export(model, tmp_path / "int4")
    other = tiny()
    prepare(other, trained)
    with pytest.raises(KconvertError, match=message):
        export(other, tmp_path / "other", source=tmp_path / "int4")
    assert not (tmp_path / "other").exists()


def test_from_kimi_to_kimi_the_codes_of_untouched_weights_stay(sample, tmp_path):
    """INT4 -> BF16 masters -> steps of training that reach one expert -> INT4: every other tensor is the source's."""
    from transformers import DeepseekV3ForCausalLM

    source = sample(tmp_path / "int4", layers=2, shard_size=10**9)
    kconvert.convert(kconvert.plan(source, kconvert.Recipe("bf16")), tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    (tmp_path / "bf16" / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3", "auto_map": {}}))
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    prepare(model)
    touched = model.model.layers[1].mlp.experts.down_proj
    touched.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) == 2).view(-1, 1, 1))
    optimiser = torch.optim.Adam([touched], lr=1e-2)
    ids = torch.arange(64).view(2, 32) * 7 % 500
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    export(model, tmp_path / "out", source=source)
    ours, theirs = ({}, {})
    for folder, tensors in ((source, ours), (tmp_path / "out", theirs)):
        for file in folder.glob("*.safetensors"):
            tensors.update(load_file(file))
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {f"model.layers.1.mlp.experts.2.down_proj.weight_{part}" for part in ("packed", "scale")}
    shutil.rmtree(tmp_path / "out" / ".kconvert")
    kconvert.convert(kconvert.plan(tmp_path / "out", kconvert.Recipe("bf16")), tmp_path / "again")
    kconvert.verify(tmp_path / "out", tmp_path / "again")
