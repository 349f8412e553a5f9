"""The hyperparameters of models whose attention looks at a part of what was said: compressed, or chosen by an indexer.

Source: https://github.com/ggml-org/llama.cpp, `src/llama-arch.cpp`, `src/models/deepseek4.cpp` and `conversion/deepseek.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.errors import KconvertError
from kconvert.targets.gguf.fields import Fields

if TYPE_CHECKING:
    from gguf import GGUFWriter

SQRT_SOFTPLUS = 4  # llama.cpp's number for it, which gguf (0.19) has not
RATIOS = (0, 4, 128)  # of the compression, that llama.cpp knows
KINDS = ("full", "shared")  # of indexers
# Key without the architecture -> key of config.json.
INDEXER = {
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk",
}
INTEGERS = {
    **INDEXER,
    "attention.output_group_count": "o_groups",
    "attention.output_lora_rank": "o_lora_rank",
    "hyper_connection.count": "hc_mult",
    "hyper_connection.sinkhorn_iterations": "hc_sinkhorn_iters",
    "hash_layer_count": "num_hash_layers",
}
NUMBERS = {"attention.compress_rope_freq_base": "compress_rope_theta", "hyper_connection.epsilon": "hc_eps"}


def add_indexer(writer: GGUFWriter, fields: Fields) -> None:
    """What chooses the tokens that are attended to: in each layer, or in those that `indexer_types` calls full."""
    for key, name in INDEXER.items():
        writer.add_uint32(f"{writer.arch}.{key}", fields.integer(name))
    if not fields.has("indexer_types"):
        return
    layers, kinds = fields.integer("num_hidden_layers"), fields.value("indexer_types")
    if not isinstance(kinds, list) or len(kinds) < layers or any(kind not in KINDS for kind in kinds[:layers]):
        raise fields.fault("indexer_types", f"full or shared for each of the {layers} layers")
    writer.add_array(f"{writer.arch}.attention.indexer.types", [kind == "full" for kind in kinds[:layers]])


def deepseek4(writer: GGUFWriter, fields: Fields) -> None:
    """One head of keys that are the values, too, compressed in most layers; streams; experts of the first layers by token."""
    head, streams = fields.integer("head_dim"), fields.integer("hc_mult")
    writer.add_head_count_kv(fields.integer("num_key_value_heads"))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(fields.integer("qk_rope_head_dim"))
    writer.add_q_lora_rank(fields.integer("q_lora_rank"))
    writer.add_sliding_window(fields.integer("sliding_window"))
    writer.add_embedding_length_out(fields.integer("hidden_size") * streams)
    for key, name in INTEGERS.items():
        writer.add_uint32(f"{writer.arch}.{key}", fields.integer(name))
    for key, name in NUMBERS.items():
        writer.add_float32(f"{writer.arch}.{key}", fields.number(name))
    writer.add_array(f"{writer.arch}.attention.compress_ratios", _ratios(fields))
    writer.add_expert_count(fields.integer("n_routed_experts"))
    writer.add_expert_feed_forward_length(fields.integer("moe_intermediate_size"))
    writer.add_expert_shared_count(fields.integer("n_shared_experts"))
    writer.add_expert_weights_scale(fields.number("routed_scaling_factor"))
    writer.add_expert_weights_norm(fields.true("norm_topk_prob"))
    limits = [fields.number("swiglu_limit")] * fields.integer("num_hidden_layers")
    writer.add_swiglu_clamp_exp(limits)
    writer.add_swiglu_clamp_shexp(limits)
    if fields.value("scoring_func") not in (None, "sqrtsoftplus"):  # None: transformers takes it to be that
        raise KconvertError(f"config.json: scoring_func is {fields.value('scoring_func')!r:.80}, not sqrtsoftplus")
    writer.add_uint32(f"{writer.arch}.expert_gating_func", SQRT_SOFTPLUS)


def _ratios(fields: Fields) -> list[int]:
    """How much each layer compresses; releases have entries for what predicts further tokens behind them."""
    layers, ratios = fields.integer("num_hidden_layers"), fields.value("compress_ratios")
    if (
        not isinstance(ratios, list)
        or len(ratios) < layers
        or any(type(ratio) is not int or ratio not in RATIOS for ratio in ratios[:layers])
    ):
        raise fields.fault("compress_ratios", f"0, 4 or 128 for each of the {layers} layers")
    return ratios[:layers]
