"""The hyperparameters of a GGUF file, from config.json, under the keys that llama.cpp's loader looks for.

Source: https://github.com/ggml-org/llama.cpp, `src/models/*.cpp` and `conversion/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kconvert.errors import KconvertError
from kconvert.models.model import Model
from kconvert.targets.gguf.architectures import section_of, title_of
from kconvert.targets.gguf.fields import Fields
from kconvert.targets.gguf.kimi_k3 import kimi_k3
from kconvert.targets.gguf.sparse import add_indexer, deepseek4

if TYPE_CHECKING:
    from gguf import ExpertGatingFuncType, GGUFWriter

# Of gguf.LlamaFileType: what most of the experts are, for people.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32, "MXFP4": 38, "NVFP4": 39}
QUANTIZATION_VERSION = 2
# How llama.cpp's "yarn_log_mul" relates to DeepSeek's mscale_all_dim.
LOG_MUL = 0.1
ALL_EXPERTS = ("deepseek4",)  # that have no other MLPs, and no size of them
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # how models call the number of them
USED = ("num_experts_per_tok", "num_experts_per_token")


def add_hyperparameters(writer: GGUFWriter, model: Model, architecture: str, layers: int, experts: str) -> None:
    """All keys but the tokenizer's; `experts` is the GGUF type of most of them. KconvertError where config.json lacks one, or
    says what llama.cpp does not do."""
    fields = Fields(section_of(model), f"{model.checkpoint.root}/config.json")
    writer.add_type("model")
    writer.add_name(title_of(model))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[experts])
    writer.add_block_count(layers)
    for key, add in (
        ("max_position_embeddings", writer.add_context_length),
        ("hidden_size", writer.add_embedding_length),
        ("num_attention_heads", writer.add_head_count),
        ("vocab_size", writer.add_vocab_size),
    ):
        add(fields.integer(key))
    if architecture not in ALL_EXPERTS:
        writer.add_feed_forward_length(fields.integer("intermediate_size"))
    writer.add_expert_used_count(_experts_used(fields))
    writer.add_layer_norm_rms_eps(fields.number("rms_norm_eps"))
    if architecture != "kimi-k3":  # which has no positions
        _add_rope(writer, fields)
    OWN[architecture](writer, fields)


def _experts_used(fields: Fields) -> int:
    """By a token; KconvertError where these are more experts than there are, with which llama.cpp does not start."""
    key, by_token = (next(filter(fields.has, keys), keys[0]) for keys in (EXPERTS, USED))
    used, count = fields.integer(by_token), fields.integer(key)
    if not 0 < used <= count:
        raise fields.fault(by_token, f"a number from 1 to the {count} of {key}")
    return used


def _add_rope(writer: GGUFWriter, fields: Fields) -> None:
    """Rotary positions; transformers 5 has all of it in rope_parameters."""
    from gguf import RopeScalingType

    rope = fields.table("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    writer.add_rope_freq_base((rope if rope.has("rope_theta") else fields).number("rope_theta"))
    kind = rope.value("rope_type") or rope.value("type") or "default"
    if kind == "default":
        return
    if kind != "yarn":
        raise KconvertError(f"config.json scales rotary positions by {kind!r:.80}, which is not mapped to GGUF yet")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope.number("factor"))
    original = rope if rope.has("original_max_position_embeddings") else fields
    writer.add_rope_scaling_orig_ctx_len(original.integer("original_max_position_embeddings"))
    for key, add in (
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.has(key):
            add(rope.number(key))
    if rope.has("mscale_all_dim"):
        if rope.number("mscale_all_dim") != rope.number("mscale"):
            raise KconvertError("config.json: mscale and mscale_all_dim differ, for which llama.cpp has one number")
        writer.add_rope_scaling_yarn_log_mul(LOG_MUL * rope.number("mscale_all_dim"))


def _deepseek2(writer: GGUFWriter, fields: Fields) -> None:
    """Latent attention, absorbed: one head of keys and values, as long as the latent is."""
    latent, rope, nope = (fields.integer(f"{key}") for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(fields.integer("q_lora_rank"))
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(fields.integer("v_head_dim"))
    writer.add_rope_dimension_count(rope)
    writer.add_expert_feed_forward_length(fields.integer("moe_intermediate_size"))
    writer.add_expert_count(fields.integer("n_routed_experts"))
    if fields.integer("topk_group") < fields.integer("n_group"):  # else all groups are looked at
        writer.add_expert_group_count(fields.integer("n_group"))
        writer.add_expert_group_used_count(fields.integer("topk_group"))
    _shared_experts(writer, fields)


def _indexed(writer: GGUFWriter, fields: Fields) -> None:
    """The same, and of each layer an indexer that says what is attended to."""
    _deepseek2(writer, fields)
    add_indexer(writer, fields)


def _shared_experts(writer: GGUFWriter, fields: Fields) -> None:
    """Layers without experts first, then such with routed and shared ones."""
    writer.add_leading_dense_block_count(fields.integer("first_k_dense_replace"))
    writer.add_expert_shared_count(fields.integer("n_shared_experts"))
    writer.add_expert_weights_scale(fields.number("routed_scaling_factor"))
    writer.add_expert_weights_norm(fields.true("norm_topk_prob"))
    writer.add_expert_gating_func(_sigmoid(fields))


def _sigmoid(fields: Fields) -> ExpertGatingFuncType:
    from gguf import ExpertGatingFuncType

    if fields.value("scoring_func") not in (None, "sigmoid"):  # transformers leaves it out: it knows no other
        raise KconvertError(f"config.json: scoring_func is {fields.value('scoring_func')!r:.80}, not sigmoid")
    return ExpertGatingFuncType.SIGMOID


def _grouped_query(writer: GGUFWriter, fields: Fields, experts: tuple[str, ...], width: str) -> int:
    """Attention by groups of heads, and experts of which one of these keys says the number, and `width` the size. Returns the
    size of a head."""
    heads = fields.integer("num_attention_heads")
    head = fields.integer("head_dim") if fields.has("head_dim") else fields.integer("hidden_size") // max(heads, 1)
    writer.add_head_count_kv(fields.integer("num_key_value_heads"))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_expert_count(fields.integer(next(filter(fields.has, experts), experts[0])))
    writer.add_expert_feed_forward_length(fields.integer(width))
    return head


def _qwen3moe(writer: GGUFWriter, fields: Fields) -> None:
    if not fields.true("norm_topk_prob"):
        raise KconvertError("config.json: norm_topk_prob is not true, but llama.cpp normalises the weights of experts")
    if fields.true("use_sliding_window"):
        raise KconvertError("config.json: use_sliding_window is true, which llama.cpp does not do for this model")
    _grouped_query(writer, fields, ("num_experts", "num_local_experts"), "moe_intermediate_size")


def _gpt_oss(writer: GGUFWriter, fields: Fields) -> None:
    """Every second layer looks at a window only, the first one does."""
    kinds = fields.value("layer_types")
    turns = ("sliding_attention", "full_attention")
    if isinstance(kinds, list) and any(kind != turns[i % 2] for i, kind in enumerate(kinds)):
        raise KconvertError("config.json: layer_types do not take turns, sliding first, as llama.cpp takes them to do")
    writer.add_sliding_window(fields.integer("sliding_window"))
    _grouped_query(writer, fields, ("num_local_experts", "num_experts"), "intermediate_size")


def _rotated(fields: Fields, head: int) -> int:
    """How many of a head's numbers have rotary positions: as such, or as a part of them."""
    key = "rotary_dim"
    if fields.has(key):
        size = fields.integer(key)
    else:
        key, rope = "partial_rotary_factor", fields.table("rope_parameters")
        size = int(head * (rope if rope.has(key) else fields).number(key))
    if not 0 < size <= head:
        raise KconvertError(f"config.json: {key} rotates {size} numbers of heads that have {head}")
    return size


def _glm4moe(writer: GGUFWriter, fields: Fields) -> None:
    """Rotary positions in a part of each head, and experts as DeepSeek has them."""
    if fields.integer("topk_group") < fields.integer("n_group"):
        raise KconvertError("config.json: topk_group is less than n_group, but llama.cpp knows no groups of this model")
    head = _grouped_query(writer, fields, ("n_routed_experts",), "moe_intermediate_size")
    writer.add_rope_dimension_count(_rotated(fields, head))
    _shared_experts(writer, fields)


def _minimax_m2(writer: GGUFWriter, fields: Fields) -> None:
    """Rotary positions in a part of each head; experts by sigmoid, with a bias."""
    head = _grouped_query(writer, fields, ("num_local_experts",), "intermediate_size")
    writer.add_rope_dimension_count(_rotated(fields, head))
    writer.add_expert_gating_func(_sigmoid(fields))


OWN: Mapping[str, Callable[[GGUFWriter, Fields], None]] = {
    "deepseek2": _deepseek2,
    "deepseek32": _indexed,
    "deepseek4": deepseek4,
    "glm-dsa": _indexed,
    "qwen3moe": _qwen3moe,
    "gpt-oss": _gpt_oss,
    "glm4moe": _glm4moe,
    "kimi-k3": kimi_k3,
    "minimax-m2": _minimax_m2,
}
