"""gpt-oss trained on MXFP4 is exported as its releases are, which transformers loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

import kconvert
from kconvert.address import open_checkpoint
from kconvert.errors import KconvertError
from kconvert.models.model import understand
from kconvert.targets.sample import SampleRecipe, plan_synthetic
from kconvert_qat import QATConfig, export, load, prepare
from kconvert_qat.attach import attached_to
from kconvert_qat.names import check_grid

MXFP4 = QATConfig(grid="mxfp4")


def loaded(folder, dtype=torch.bfloat16):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    options = {"quantization_config": Mxfp4Config(dequantize=True), "output_loading_info": True}
    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_computes_the_trainers_logits_from_the_export(tiny, ids, tmp_path, dtype):
    model = tiny("gpt-oss", dtype=dtype)
    prepare(model, MXFP4)
    export(model, tmp_path / "mxfp4")
    names = set(tensors_of(tmp_path / "mxfp4"))
    experts = "model.layers.1.mlp.experts"
    assert {f"{experts}.gate_up_proj_blocks", f"{experts}.down_proj_scales", f"{experts}.gate_up_proj_bias"} <= names
    assert f"{experts}.gate_up_proj" not in names
    back = loaded(tmp_path / "mxfp4", dtype)
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_the_export_has_the_shapes_of_the_release_and_what_verify_wants(tiny, tmp_path, caplog):
    model = tiny("gpt-oss")
    prepare(model, MXFP4)
    export(model, tmp_path / "mxfp4")
    assert not caplog.text
    tensors = tensors_of(tmp_path / "mxfp4")
    assert tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (4, 64, 2, 16)
    assert tensors["model.layers.0.mlp.experts.down_proj_scales"].shape == (4, 64, 1)
    assert (
        json.loads((tmp_path / "mxfp4" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    )
    found = {
        weight.format.label
        for weight in understand(open_checkpoint(tmp_path / "mxfp4")).weights
        if "experts" in weight.name
    }
    assert found == {"mxfp4 stack"}
    kconvert.convert(kconvert.plan(tmp_path / "mxfp4", kconvert.Recipe("bf16")), tmp_path / "bf16")
    assert kconvert.verify(tmp_path / "mxfp4", tmp_path / "bf16").weights
    experts = model.model.layers[0].mlp.experts
    values = tensors_of(tmp_path / "bf16")
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(values[f"model.layers.0.mlp.experts.{name}"], attached_to(experts).serve(experts, name))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small checkpoint in the shape of openai/gpt-oss-20b."""
    sizes = {"layers": 2, "experts": 4, "hidden": 64, "moe_intermediate": 32, "vocab": 128, "heads": 4, "kv_heads": 2}
    root = tmp_path_factory.mktemp("gpt-oss") / "released"
    kconvert.convert(plan_synthetic(SampleRecipe("gpt-oss", sizes)), root)
    return root


def test_a_release_is_trained_and_goes_back_with_the_codes_of_what_was_not_trained(released, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(released)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    load(model, released)
    prepare(model, MXFP4)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] *= 1.3
    export(model, tmp_path / "back", source=released)
    before, after = tensors_of(released), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.experts.down_proj_blocks", "model.layers.1.mlp.experts.down_proj_scales"}
    for name in changed:
        same = [torch.equal(before[name][k], after[name][k]) for k in range(4)]
        assert same[:2] + same[3:] == [True] * 3
    config = [json.loads((folder / "config.json").read_text()) for folder in (released, tmp_path / "back")]
    assert config[0] == config[1]


def test_the_guard_knows_the_release_and_refuses_another_grid(released):
    config = open_checkpoint(released).config
    check_grid(config, MXFP4, ())
    with pytest.raises(KconvertError, match="has experts in stacks of mxfp4, but the QAT grid is int4 kimi group 32"):
        check_grid(config, QATConfig(), ())


def test_in_another_grid_gpt_oss_is_refused_as_before(tiny, tmp_path):
    model = tiny("gpt-oss")
    prepare(model)
    with pytest.raises(KconvertError, match="which it keeps fused"):
        export(model, tmp_path / "int4")


def test_some_experts_in_mxfp4_beside_others_in_bf16_are_loaded_as_well(tiny, ids, tmp_path):
    model = tiny("gpt-oss")
    prepare(model, QATConfig(grid="mxfp4", targets=("expert.down",)))
    export(model, tmp_path / "mxfp4")
    assert torch.equal(loaded(tmp_path / "mxfp4")(ids).logits, model(ids).logits)


def test_a_patch_of_stacks_is_a_whole_export(tiny, tmp_path):
    model = tiny("gpt-oss")
    prepare(model, MXFP4)
    export(model, tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[3] *= 1.2
    export(model, tmp_path / "patch", only_changed=True)
    kconvert.apply(tmp_path / "base", tmp_path / "patch")
    export(model, tmp_path / "whole")
    mine, wanted = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
