import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kconvert import KconvertError
from kconvert.models.catalogue import load_manifest, manifest_for

KIMI = load_manifest("kimi-k2-thinking")
SPEC_CONFIG = {  # spec/checkpoints.md
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
    "torch_dtype": "bfloat16",
}
NAMES = KIMI.bind(SPEC_CONFIG)


@pytest.fixture(scope="module")
def published():
    """(name, role, shape) of everything that Kimi-K2-Thinking has."""
    return [(name, match.rule.role, match.shape) for name, match in NAMES.expected()]


def test_the_manifest_of_kimi_carries_the_published_config():
    assert {key: KIMI.config[key] for key in SPEC_CONFIG} == SPEC_CONFIG


def test_kimi_has_the_published_number_of_parameters(published):
    assert sum(math.prod(shape) for _, _, shape in published) == 1_026_408_232_448


def test_the_routed_experts_of_kimi_have_the_published_number_of_parameters(published):
    routed = [shape for _, role, shape in published if role.startswith("expert.")]
    assert sum(map(math.prod, routed)) == 1_014_686_023_680
    assert 3 * len(routed) == 207_360  # weight_packed, weight_scale, weight_shape


def test_every_expected_name_is_expected_once_and_matches_its_own_rule(published):
    assert len({name for name, _, _ in published}) == len(published)
    for name, role, shape in published[::97]:
        match = NAMES.match(name)
        assert (match.rule.role, match.shape) == (role, shape)


@pytest.mark.parametrize(
    ("name", "role", "shape"),
    [
        ("model.layers.1.mlp.experts.0.gate_proj", "expert.gate", (2048, 7168)),
        ("model.layers.60.mlp.experts.383.down_proj", "expert.down", (7168, 2048)),
        ("model.layers.0.mlp.up_proj", "dense.up", (18432, 7168)),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa", "attention.kv_a", (576, 7168)),
        ("model.layers.0.self_attn.q_b_proj", "attention.q_b", (12288, 1536)),
        ("model.layers.1.mlp.shared_experts.down_proj", "shared.down", (7168, 2048)),
        ("model.layers.1.mlp.gate.weight", "router", (384, 7168)),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "router.bias", (384,)),
        ("lm_head", "lm_head", (163840, 7168)),
        ("model.norm.weight", "norm", (7168,)),
    ],
)
def test_a_name_has_the_role_and_shape_of_the_published_model(name, role, shape):
    match = NAMES.match(name)
    assert (match.rule.role, match.shape) == (role, shape)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.61.self_attn.o_proj",
        "model.layers.0.mlp.experts.0.gate_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.experts.384.gate_proj",
        "model.layers.01.mlp.experts.0.gate_proj",
        "model.layers.-1.self_attn.o_proj",
        "model.layers..self_attn.o_proj",
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "xmodel.layers.1.self_attn.o_proj",
        "lm_head.0",
        "",
    ],
)
def test_a_name_that_the_model_does_not_have_matches_nothing(name):
    assert NAMES.match(name) is None


def test_a_match_tells_layer_and_expert():
    match = NAMES.match("model.layers.7.mlp.experts.31.up_proj")
    assert (match.layer, match.expert) == (7, 31)


@given(st.text(alphabet="model.layers0123456789_{}#", max_size=40))
def test_no_name_breaks_the_matching(name):
    NAMES.match(name)


@pytest.mark.parametrize("value", [None, "61", 61.0, -1, True])
def test_a_config_whose_dimension_is_no_size_is_refused_by_key(value):
    with pytest.raises(
        KconvertError, match=f"num_hidden_layers is {'missing' if value is None else re.escape(repr(value))}"
    ):
        KIMI.bind({**SPEC_CONFIG, "num_hidden_layers": value})


def test_resizing_changes_what_is_named_and_what_it_bounds_and_nothing_else():
    resized = KIMI.resize(KIMI.config, {"experts": 4, "heads": 2})
    changed = {key for key in KIMI.config if resized[key] != KIMI.config[key]}
    assert changed == {"n_routed_experts", "num_experts_per_tok", "num_attention_heads", "num_key_value_heads"}
    assert (resized["num_experts_per_tok"], resized["num_key_value_heads"]) == (4, 2)
    assert KIMI.config["n_routed_experts"] == 384


def test_resizing_an_unknown_dimension_is_refused_with_those_there_are():
    with pytest.raises(KconvertError, match="has no breadth; it has layers, dense_layers"):
        KIMI.resize(KIMI.config, {"breadth": 1})


@pytest.mark.parametrize(
    ("config", "name"),
    [({"model_type": "kimi_k2"}, "kimi-k2-thinking"), ({"model_type": "llama"}, "generic"), ({}, "generic")],
)
def test_the_model_type_chooses_the_manifest(config, name):
    assert manifest_for(config).name == name


@pytest.mark.parametrize("model_type", [["kimi_k2"], {}, 3])
def test_a_model_type_that_is_no_string_is_nobodys(model_type):
    assert manifest_for({"model_type": model_type}).name == "generic"


def test_an_unknown_manifest_is_refused_with_those_there_are():
    with pytest.raises(KconvertError, match=r"no manifest 'gpt'; there are .*generic, .*kimi-k2-thinking, "):
        load_manifest("gpt")
