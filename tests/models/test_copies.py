"""A converted checkpoint never holds codes that nothing declares: they are decoded, or an error that names them."""

import math

import pytest

from kconvert import CheckFailed, KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.models import model as model_module
from kconvert.report.summary import find

WIDTH = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75, "I8": 1, "U8": 1, "I16": 2, "U16": 2}
WIDTH |= {"I32": 4, "U32": 4, "F32": 4, "BF16": 2, "I64": 8, "BOOL": 1}
STACK = "model.layers.1.mlp.experts.gate_up_proj"
# What the tensors of an encoding that no rule knows are called, and the one that the error names.
UNKNOWN = {
    "a stack of FP8": {STACK: ("F8_E4M3", [2, 64, 64]), f"{STACK}_scale_inv": ("F32", [2, 1, 1])},
    "packed stacks": {f"{STACK}_packed": ("I32", [2, 64, 8]), f"{STACK}_scale": ("BF16", [2, 64, 2])},
    "another name for the scale": {"a.proj.weight": ("F8_E4M3", [64, 64]), "a.proj.scale_weight": ("F32", [])},
    "no scale at all": {"a.proj.weight": ("F8_E5M2", [64, 64])},
    "a vector": {"a.norm.weight": ("F8_E4M3", [64])},
    "FP4": {"a.proj.weight": ("F4", [64, 64]), "a.proj.weight_scales": ("F32", [64])},
    "FP6": {"a.proj.weight": ("F6_E2M3", [64, 64])},
    "MXFP4 blocks": {f"{STACK}_blocks": ("U8", [2, 64, 2, 16]), f"{STACK}_scales": ("U8", [2, 64, 2])},
    "bitsandbytes": {"a.proj.weight": ("I8", [64, 64]), "a.proj.SCB": ("F32", [64])},
    "codes widened to BF16": {STACK: ("BF16", [2, 64, 64]), f"{STACK}_scale_inv": ("F32", [2, 1, 1])},
    "a table": {"a.embed.weight": ("F8_E4M3", [64, 64]), "a.weight_scale_all": ("F32", [])},
    "codes in a row": {"a.codes": ("U8", [64]), "a.codes_scale": ("F32", [2])},
    "sixteen bits": {"a.table": ("U16", [64, 64])},
}
# Tensors that spell a weight, but not in the encoding that config.json says it is in.
ELSEWHERE = {
    "DeepSeek-V4's names": {"a.wq.weight": ("F8_E4M3", [64, 64]), "a.wq.scale": ("F8_E8M0", [1, 1])},
    "GPTQ": {"a.wq.qweight": ("I32", [8, 64]), "a.wq.qzeros": ("I32", [2, 8]), "a.wq.scales": ("F32", [2, 64])},
    "pairs in I8": {"a.w1.weight": ("I8", [64, 32]), "a.w1.scale": ("F8_E8M0", [64, 2])},
}
SOUND = {
    "a hash table": {"model.layers.1.mlp.gate.tid2eid": ("I64", [64, 6])},
    "a hash table of I32": {"model.layers.1.mlp.gate.tid2eid": ("I32", [64, 6])},
    "positions": {"a.embeddings.position_ids": ("I32", [1, 64])},
    "integers in a row": {"a.counts": ("I32", [64])},
    "a mask": {"a.attn.bias": ("U8", [1, 1, 64, 64])},
    "masks of old releases": {"a.causal_mask": ("U8", [8, 8]), "a.attention_mask": ("U8", [8, 8])},
    "a draft's vocabulary": {"d2t": ("I64", [64]), "model.t2d": ("U8", [64, 1])},
    "parameters called scale": {"layers.0.hc_attn_scale": ("F32", [3]), "logit_scale": ("F32", [])},
    "a scale of a router": {"a.router.proj.weight": ("BF16", [4, 64]), "a.router.scale": ("BF16", [64])},
}


def build(raw, dtype, shape):
    return raw.Tensor(dtype, shape, bytes(int(math.prod(shape) * WIDTH[dtype])))


def put(raw, checkpoint, tensors):
    for name, (dtype, shape) in tensors.items():
        checkpoint.put(name, build(raw, dtype, shape))
    return checkpoint.save()


@pytest.fixture
def unknown_family(raw, int4_copy):
    """The tiny checkpoint as a model that no manifest knows."""
    checkpoint = raw.load(int4_copy)
    checkpoint.config["model_type"] = "unheard_of"
    return checkpoint


@pytest.mark.parametrize("to", ["bf16", "fp8", "mxfp4"])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_codes_that_no_rule_decodes_are_refused_before_a_byte_is_written(raw, unknown_family, kind, to, tmp_path):
    source = put(raw, unknown_family, UNKNOWN[kind])
    with pytest.raises(KconvertError, match="which no rule decodes") as caught:
        convert(plan(source, Recipe(to)), tmp_path / "dst")
    assert any(repr(name) in str(caught.value) for name in UNKNOWN[kind])
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_manifest_lets_no_codes_pass_either(raw, int4_copy, kind):
    source = put(raw, raw.load(int4_copy), UNKNOWN[kind])
    with pytest.raises(KconvertError, match="which no rule decodes"):
        plan(source, Recipe("bf16"))


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_codes_in_another_encoding_than_declared_are_refused(raw, unknown_family, kind):
    source = put(raw, unknown_family, ELSEWHERE[kind])
    with pytest.raises(KconvertError, match=r"'a\.w.' cannot be read: .* while config\.json says"):
        plan(source, Recipe("bf16"))


@pytest.mark.parametrize("kind", UNKNOWN)
def test_inspect_names_such_codes_as_a_finding(raw, unknown_family, kind):
    source = put(raw, unknown_family, UNKNOWN[kind])
    assert any("which no rule decodes" in finding for finding in find(inspect(source)))


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_no_code_is_copied(raw, unknown_family, kind, tmp_path, tree):
    source = put(raw, unknown_family, SOUND[kind])
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    written = raw.load(tmp_path / "dst")
    assert {name: (written[name].dtype, written[name].shape) for name in SOUND[kind]} == SOUND[kind]


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_tensor_that_the_manifest_calls_bf16_is_not_copied_as_fp8(raw, int4_copy, name):
    checkpoint = raw.load(int4_copy)
    checkpoint[name].dtype, size = "F8_E4M3", math.prod(checkpoint[name].shape)
    checkpoint[name].data = bytes(size)
    with pytest.raises(KconvertError, match=name.removesuffix(".weight")):
        plan(checkpoint.save(), Recipe("bf16"))


def test_a_quantised_vision_tower_is_not_copied(raw, tmp_path):
    from kconvert.targets.sample import SampleRecipe, plan_synthetic

    sizes = {"layers": 2, "experts": 2, "hidden": 256, "intermediate": 256, "moe_intermediate": 128, "vocab": 128}
    convert(plan_synthetic(SampleRecipe("kimi-k2.5", {**sizes, "heads": 4})), tmp_path / "src")
    checkpoint = raw.load(tmp_path / "src")
    name = "vision_tower.encoder.blocks.0.wo.weight"
    rows, cols = checkpoint[name].shape
    checkpoint[name].dtype, checkpoint[name].data = "F8_E4M3", bytes(rows * cols)
    checkpoint.put(name + "_scale", raw.Tensor("BF16", [rows, 1], bytes(2 * rows)))
    with pytest.raises(KconvertError, match=r"vision_tower.encoder.blocks.0.wo"):
        plan(checkpoint.save(), Recipe("bf16"))


@pytest.mark.parametrize("kind", sorted(set(UNKNOWN) - {"codes widened to BF16"}))
def test_verify_sees_undeclared_codes_even_where_the_conversion_did_not(
    raw, unknown_family, kind, tmp_path, monkeypatch
):
    source = put(raw, unknown_family, UNKNOWN[kind])
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "undecoded", lambda tensors: iter(()))
        convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    with pytest.raises(CheckFailed, match="but"):
        verify(source, tmp_path / "dst")


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json"])
@pytest.mark.parametrize("model_type", ["kimi_k2", "unheard_of"])
def test_a_quantisation_that_only_a_file_beside_config_json_declares_is_named(raw, int4_copy, file, model_type):
    checkpoint = raw.load(int4_copy)
    del checkpoint.config["quantization_config"]
    checkpoint.config["model_type"] = model_type
    source = checkpoint.save()
    said = '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}'
    (source / file).write_text(said if file.startswith("hf") else '{"quant_method": "hqq"}')
    named = f"while {file} says it is nvfp4" if file.startswith("hf") else f"{file} is HQQ .*, which is not read"
    with pytest.raises(KconvertError, match=named):
        plan(source, Recipe("bf16"))


@pytest.mark.parametrize("config", [None, {}], ids=["no config.json", "an empty one"])
def test_a_checkpoint_without_a_config_json_is_said_to_lack_it(raw, int4_copy, config):
    checkpoint = raw.load(int4_copy)
    checkpoint.config.clear()
    source = checkpoint.save()
    if config is None:
        (source / "config.json").unlink()
    with pytest.raises(KconvertError, match=r"config\.json is missing or empty, and only it says how weights are quan"):
        plan(source, Recipe("bf16"))


# What lies there of an expert whose encoding is not read, and what must be said of it.
FOREIGN = {
    "NVFP4 of ModelOpt": (
        {"weight": ("U8", [64, 32]), "weight_scale": ("U8", [64, 4]), "weight_scale_2": ("F32", [])},
        "weight_scale_2 does not belong to it, while config.json says it is fp8",
    ),
    "GPTQ": (
        {"qweight": ("I32", [8, 64]), "g_idx": ("I32", [64]), "qzeros": ("I32", [2, 8]), "scales": ("F32", [2, 64])},
        "it has no weight, but g_idx, qweight, qzeros, scales, while config.json says it is fp8",
    ),
    "MLX": ({"weight": ("U32", [64, 8]), "scales": ("BF16", [64, 2]), "biases": ("BF16", [64, 2])}, "weight is U32"),
}


@pytest.mark.parametrize("model_type", ["kimi_k2", "unheard_of"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_an_encoding_that_is_not_read_is_not_said_to_lack_what_it_has(raw, int4_copy, kind, model_type):
    checkpoint = raw.load(int4_copy)
    checkpoint.config["model_type"] = model_type
    checkpoint.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors, said = FOREIGN[kind]
    for file in checkpoint.files.values():
        for name in [name for name in file if ".experts." in name]:
            del file[name]
    source = put(raw, checkpoint, {f"model.layers.1.mlp.experts.0.up_proj.{k}": v for k, v in tensors.items()})
    with pytest.raises(KconvertError) as caught:
        plan(source, Recipe("bf16"))
    assert said in str(caught.value)
    assert "no scale" not in str(caught.value)
