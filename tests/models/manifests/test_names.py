"""What a config.json says of a model decides which tensors it has; nothing that is missing or unknown goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.models.catalogue import load_manifest, load_manifests, manifest_for
from kconvert.models.manifest import Manifest
from kconvert.models.model import Model, understand
from kconvert.models.sizes import evaluate

Config = Callable[..., dict[str, Any]]
Tensors = Callable[..., dict[str, Tensor]]
INT4 = {"quantization_config": {"quant_method": "compressed-tensors"}}
FP8 = {"quantization_config": {"quant_method": "fp8"}}


@pytest.fixture
def read(checkpoint_of: Callable[..., Checkpoint]) -> Callable[..., Model]:
    """`read(config, tensors)` understands a checkpoint that has these."""
    return lambda config, tensors: understand(checkpoint_of(config, tensors))


@pytest.mark.parametrize("name", sorted(set(load_manifests()) - {"generic"}))
def test_a_missing_tensor_is_named(small_config: Config, tensors_of: Tensors, read: Any, name: str) -> None:
    config = small_config(name)
    tensors = tensors_of(name, config)
    norms = ("layers.1.input_layernorm.weight", "layers.1.attn_norm.weight")
    lost = next(tensor for tensor in tensors if tensor.endswith(norms))
    del tensors[lost]
    with pytest.raises(KconvertError, match=f"'{lost}' missing"):
        read(config, tensors)


@pytest.mark.parametrize("name", sorted(set(load_manifests()) - {"generic"}))
def test_an_unlisted_tensor_is_a_finding(small_config: Config, tensors_of: Tensors, read: Any, name: str) -> None:
    config = small_config(name)
    tensors = tensors_of(name, config)
    tensors["model.layers.1.mlp.mystery"] = Tensor("model.layers.1.mlp.mystery", "BF16", (1,), "a", 0, 2)
    (finding,) = read(config, tensors).findings
    assert finding.startswith("model.layers.1.mlp.mystery not listed in the manifest")


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4-moe"])
def test_an_mtp_layer_may_be_missing_as_a_whole(
    small_config: Config, tensors_of: Tensors, read: Any, name: str
) -> None:
    config = small_config(name)
    tensors = {key: value for key, value in tensors_of(name, config).items() if not key.startswith("model.layers.4.")}
    assert max(weight.layer or 0 for weight in read(config, tensors).weights) == 3


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4-moe"])
def test_of_an_mtp_layer_no_part_may_be_missing(
    small_config: Config, tensors_of: Tensors, read: Any, name: str
) -> None:
    config = small_config(name)
    tensors = tensors_of(name, config)
    del tensors["model.layers.4.mlp.experts.3.up_proj.weight"]
    with pytest.raises(KconvertError, match=r"'model.layers.4.mlp.experts.3.up_proj' missing"):
        read(config, tensors)


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4-moe"])
def test_an_mtp_layer_may_leave_out_its_copies_of_embedding_and_head(
    small_config: Config, tensors_of: Tensors, read: Any, name: str
) -> None:
    config = small_config(name)
    tensors = tensors_of(name, config)
    del tensors["model.layers.4.embed_tokens.weight"], tensors["model.layers.4.shared_head.head.weight"]
    assert read(config, tensors).manifest.name == name


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_lm_head_may_be_missing(small_config: Config, tensors_of: Tensors, read: Any, tied: bool) -> None:
    config = small_config("qwen3-moe", tie_word_embeddings=tied)
    tensors = tensors_of("qwen3-moe", config)
    assert any(weight.role == "lm_head" for weight in read(config, tensors).weights)
    del tensors["lm_head.weight"]
    if tied:
        assert read(config, tensors)
    else:
        with pytest.raises(KconvertError, match="'lm_head' missing"):
            read(config, tensors)


def test_without_a_query_rank_there_is_one_query_projection(small_config: Config, tensors_of: Tensors) -> None:
    with_rank = tensors_of("deepseek-v3", small_config("deepseek-v3"))
    without = tensors_of("deepseek-v3", small_config("deepseek-v3", q_lora_rank=None))
    ours = {name.rpartition("layers.0.self_attn.")[2] for name in without.keys() - with_rank.keys()}
    theirs = {name.rpartition("layers.0.self_attn.")[2] for name in with_rank.keys() - without.keys()}
    assert "q_proj.weight" in ours
    assert {"q_a_proj.weight", "q_b_proj.weight", "q_a_layernorm.weight"} <= theirs
    assert without["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 192, 256)


def test_biases_and_query_norms_are_there_where_config_json_says_so(small_config: Config, tensors_of: Tensors) -> None:
    plain = tensors_of("glm-4-moe", small_config("glm-4-moe", attention_bias=False, use_qk_norm=False))
    rich = tensors_of("glm-4-moe", small_config("glm-4-moe", attention_bias=True, use_qk_norm=True))
    extra = {name.removeprefix("model.layers.0.self_attn.") for name in rich.keys() - plain.keys() if ".0." in name}
    assert extra == {"q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"}


def test_a_head_size_that_config_json_leaves_out_is_hidden_size_over_heads(
    small_config: Config, tensors_of: Tensors
) -> None:
    config = small_config("qwen3-moe", head_dim=None)
    assert tensors_of("qwen3-moe", config)["model.layers.0.self_attn.q_norm.weight"].shape == (256 // 4,)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, {0, 1, 2, 3}),
        ({"mlp_only_layers": [0, 2]}, {1, 3}),
        ({"decoder_sparse_step": 2}, {1, 3}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1}),
    ],
)
def test_qwen_layers_are_dense_or_sparse_as_in_transformers(
    small_config: Config, tensors_of: Tensors, changes: dict[str, Any], sparse: set[int]
) -> None:
    tensors = tensors_of("qwen3-moe", small_config("qwen3-moe", **changes))
    dense = {layer for layer in range(4) if f"model.layers.{layer}.mlp.up_proj.weight" in tensors}
    routed = {layer for layer in range(4) if f"model.layers.{layer}.mlp.experts.0.up_proj.weight" in tensors}
    assert (routed, dense) == (sparse, {0, 1, 2, 3} - sparse)


def test_linear_layers_count_from_one(small_config: Config, tensors_of: Tensors) -> None:
    tensors = tensors_of("kimi-linear", small_config("kimi-linear"))
    assert [f"model.layers.{i}.self_attn.A_log" in tensors for i in range(4)] == [True, True, True, False]
    assert [f"model.layers.{i}.self_attn.kv_b_proj.weight" in tensors for i in range(4)] == [False, False, False, True]


def test_vision_tensors_are_copied_whatever_they_are_called(
    small_config: Config, tensors_of: Tensors, read: Any
) -> None:
    config = small_config("kimi-k2.5")
    tensors = tensors_of("kimi-k2.5", config)
    free = Tensor("mm_projector.new.linear.weight", "F16", (2, 3), "a", 0, 12)
    roles = {plain.tensor.name: plain.role for plain in read(config, {**tensors, free.name: free}).plain}
    assert roles[free.name] == "mm_projector"
    assert roles["vision_tower.encoder.blocks.0.wqkv.weight"] == "vision"


@pytest.mark.parametrize("vision", [{}, None])
def test_a_vision_tower_that_config_json_describes_in_other_words_or_not_at_all_is_no_obstacle(
    small_config: Config, tensors_of: Tensors, read: Any, vision: dict[str, Any] | None
) -> None:
    full = tensors_of("kimi-k2.5", small_config("kimi-k2.5"))
    model = read(small_config("kimi-k2.5", vision_config=vision), full)
    assert {plain.role for plain in model.plain} >= {"vision_tower", "mm_projector"}
    only_text = {name: tensor for name, tensor in full.items() if name.startswith("language_model.")}
    assert read(small_config("kimi-k2.5"), only_text)


@pytest.mark.parametrize(
    ("name", "usual", "other"),
    [
        ("kimi-k2.5", "language_model.model.", "language_model."),
        ("kimi-k2.5", "language_model.model.layers.", "language_model.layers."),
        ("qwen3.5-moe", "model.language_model.", "model."),
        ("qwen3.8-moe", "model.", "model.language_model."),
        ("step-3.7", "model.", "model.language_model."),
    ],
)
def test_names_that_a_release_spells_otherwise_have_their_roles(
    small_config: Config, tensors_of: Tensors, read: Any, name: str, usual: str, other: str
) -> None:
    def facts(model: Model) -> list[tuple[str, int | None, int | None, int]]:
        assert not model.findings
        return sorted(((w.role, w.layer, w.expert, w.rows) for w in model.weights), key=repr)

    config = small_config(name)
    tensors = tensors_of(name, config)
    spelt = {
        (renamed := other + key.removeprefix(usual) if key.startswith(usual) else key): tensor._replace(name=renamed)
        for key, tensor in tensors.items()
    }
    assert spelt.keys() != tensors.keys()
    assert facts(read(config, spelt)) == facts(read(config, tensors))


def test_indexers_are_absent_where_layers_share_one(small_config: Config, tensors_of: Tensors) -> None:
    def layers(**changes: Any) -> set[int]:
        tensors = tensors_of("glm-5", small_config("glm-5", **changes))
        return {int(name.split(".")[2]) for name in tensors if name.endswith("indexer.wk.weight")}

    assert layers() == {0, 1, 2, 3, 4}
    assert layers(indexer_types=["full", "shared", "shared", "full"]) == {0, 3, 4}


def test_deepseek_v4_has_layers_of_each_kind(small_config: Config, tensors_of: Tensors) -> None:
    tensors = tensors_of("deepseek-v4", small_config("deepseek-v4"))
    assert [f"layers.{i}.attn.compressor.ape" in tensors for i in range(4)] == [False, False, True, True]
    assert [f"layers.{i}.attn.indexer.wq_b.weight" in tensors for i in range(4)] == [False, False, True, False]
    assert [f"layers.{i}.ffn.gate.tid2eid" in tensors for i in range(4)] == [True, True, True, False]
    assert [f"layers.{i}.ffn.gate.bias" in tensors for i in range(4)] == [False, False, False, True]
    assert {"mtp.0.enorm.weight", "mtp.0.hc_head_fn", "mtp.0.norm.weight"} <= tensors.keys()


def test_the_first_and_the_last_stage_of_dspark_have_what_the_others_lack(
    small_config: Config, tensors_of: Tensors
) -> None:
    tensors = tensors_of("deepseek-v4-0731", small_config("deepseek-v4-0731"))
    assert [f"mtp.{i}.main_proj.weight" in tensors for i in range(4)] == [True, False, False, False]
    assert [f"mtp.{i}.markov_head.markov_w1.weight" in tensors for i in range(4)] == [False, False, True, False]
    assert [f"mtp.{i}.attn.wkv.weight" in tensors for i in range(4)] == [True, True, True, False]
    assert not any("enorm" in name for name in tensors)
    assert tensors["mtp.0.main_proj.weight"].shape == (256, 3 * 256)


def test_an_engram_table_has_rows_of_its_own(small_config: Config, tensors_of: Tensors) -> None:
    manifest = load_manifest("deepseek-v4.1")
    whole = {name: match for name, match in manifest.bind(manifest.config).expected() if ".engram.embed" in name}
    assert {name: match.shape[0] for name, match in whole.items()} == {
        "layers.1.engram.embed": 384006168,
        "layers.14.engram.embed": 384016682,
    }
    small = tensors_of("deepseek-v4.1", small_config("deepseek-v4.1"))
    assert {name for name in small if ".engram.embed" in name} == {"layers.1.engram.embed.weight"}


@pytest.mark.parametrize(
    ("model_type", "quantised", "name"),
    [
        ("kimi_k2", INT4, "kimi-k2-thinking"),
        ("kimi_k2", FP8, "kimi-k2-instruct"),
        ("kimi_k2", {}, "kimi-k2-thinking"),
        ("kimi_k25", {"text_config": INT4}, "kimi-k2.5"),
        ("kimi_k25", FP8, "kimi-k2.5"),
        ("deepseek_v3", INT4, "deepseek-v3"),
        ("gpt_oss", {}, "gpt-oss"),
        ("deepseek_v4", FP8, "deepseek-v4"),
        ("glm_moe_dsa", FP8, "glm-5.3"),
        ("glm_moe_dsa", {}, "glm-5"),
        ("qwen3_5_moe", FP8, "qwen3.5-moe-fp8"),
        ("qwen3_5_moe", {}, "qwen3.5-moe"),
        ("kimi_k3", INT4, "kimi-k3"),
        ("none of these", INT4, "generic"),
    ],
)
def test_a_model_is_known_by_its_type_in_any_quantisation(
    model_type: str, quantised: dict[str, Any], name: str
) -> None:
    assert manifest_for({"model_type": model_type, **quantised}).name == name


def test_models_that_share_a_type_have_the_same_weights() -> None:
    by_type: dict[str, list[Manifest]] = {}
    for manifest in load_manifests().values():
        for model_type in manifest.model_types:
            by_type.setdefault(model_type, []).append(manifest)
    for manifests in by_type.values():
        assert all(
            (manifest.rules, manifest.stacks) == (manifests[0].rules, manifests[0].stacks) for manifest in manifests
        )


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("mixtral", {"hidden_size": None}, "hidden_size is missing"),
        ("mixtral", {"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("mixtral", {"num_local_experts": 10**9}, "more than 4,000,000"),
        ("mixtral", {"num_hidden_layers": 10**30}, "do not make a mixtral"),
        ("mixtral", {"num_attention_heads": 0}, "do not make a mixtral"),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "do not make a qwen3-moe"),
        ("qwen3-moe", {"mlp_only_layers": "none"}, "mlp_only_layers is not a list"),
        ("kimi-linear", {"linear_attn_config": None}, "linear_attn_config.num_heads is missing"),
        ("kimi-k2.5", {"text_config": None}, "text_config is no table"),
        ("deepseek-v4", {"compress_ratios": 4}, "compress_ratios is not a list"),
        ("deepseek-v4", {"hc_mult": None}, "hc_mult is missing"),
        ("step-3", {"moe_layers_enum": "all"}, "moe_layers_enum is not a list"),
        ("ling-3", {"layer_group_size": 0}, "do not make a ling-3"),
    ],
)
def test_a_config_json_that_makes_no_model_is_refused(
    small_config: Config, name: str, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(KconvertError, match=fault):
        load_manifest(name).bind(small_config(name, **changes))


@pytest.mark.parametrize("name", sorted(set(load_manifests()) - {"generic"}))
def test_every_dimension_of_a_manifest_is_used_and_found_in_its_own_config(name: str) -> None:
    """Or stands in for one that is, where some configs have another key; or is of tensors that such a model does not have."""
    manifest = load_manifest(name)
    section = manifest.section(manifest.config)
    users = {
        symbol: [rule for rule in manifest.rules if any(symbol in size for size in rule.shape)]
        for symbol in manifest.dims
    }
    absent = {symbol for symbol, rules in users.items() if not any(rule.holds(section) for rule in rules)}
    assert set(manifest.dims) - set(manifest._sizes(section)) <= absent | set(manifest.defaults.values())
    expressions = [size for rule in manifest.rules for size in rule.shape]
    expressions += [bound for index in manifest.indices.values() for bound in index.range]
    expressions += [*manifest.defaults.values(), *manifest.limits.values(), *manifest.divisors.values()]
    assert all(any(symbol in expression for expression in expressions) for symbol in manifest.dims)
    placeholders = {placeholder for rule in manifest.rules for placeholder in rule.placeholders}
    assert placeholders <= set(manifest.indices)


def test_a_shape_expression_is_arithmetic_and_nothing_else() -> None:
    assert evaluate("heads * (nope + rope) // 2 - 1", {"heads": 3, "nope": 4, "rope": 2}) == 8
    with pytest.raises(ValueError, match="not a shape expression"):
        evaluate("__import__('os')", {})


def test_a_weight_named_as_a_tensor_is_no_tensor(small_config: Config, tensors_of: Tensors, read: Any) -> None:
    config = small_config("mixtral")
    tensors = tensors_of("mixtral", config)
    tensors["lm_head"] = tensors.pop("lm_head.weight")._replace(name="lm_head")
    model = read(config, tensors)
    assert model.findings
    assert "lm_head" in {plain.tensor.name for plain in model.plain}


def test_the_names_of_the_largest_model_are_known() -> None:
    manifest = load_manifest("kimi-k2-thinking")
    assert sum(1 for _ in manifest.bind(manifest.config).expected()) == 69_975


def test_the_largest_checkpoint_is_understood(full_tensors: Callable[[str], dict[str, Tensor]], read: Any) -> None:
    manifest, tensors = load_manifest("kimi-k2-thinking"), full_tensors("kimi-k2-thinking")
    assert read(manifest.config, tensors).parameters == 1_026_408_232_448


def test_a_config_saved_by_transformers_5_names_the_experts_otherwise(small_config: Config) -> None:
    config = small_config("qwen3-moe")
    saved = {**config, "num_local_experts": config["num_experts"]}
    del saved["num_experts"]
    manifest = load_manifest("qwen3-moe")
    assert dict(manifest.bind(saved).expected()) == dict(manifest.bind(config).expected())
