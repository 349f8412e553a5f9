"""The hyperparameters of Kimi-K3: delta attention in most layers, latent attention in the others, experts in a narrower space.

Source: https://github.com/ggml-org/llama.cpp, `src/models/kimi-k3.cpp` and `conversion/kimi_k3.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.targets.gguf.fields import Fields

if TYPE_CHECKING:
    from gguf import GGUFWriter

SIGMOID = 2
# Key without the architecture -> key of config.json.
INTEGERS = {
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.value_length": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_latent_length": "routed_expert_hidden_size",
    "expert_shared_count": "num_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "attn_res.block_size": "attn_res_block_size",
}
NUMBERS = {
    "expert_weights_scale": "routed_scaling_factor",
    "activation.situ_beta": "activation_situ_beta",
    "activation.situ_linear_beta": "activation_situ_linear_beta",
}
# What llama.cpp takes for given.
GIVEN = {"mla_use_nope": True, "hidden_act": "situ", "moe_router_activation_func": "sigmoid", "num_expert_group": 1}


def kimi_k3(writer: GGUFWriter, fields: Fields) -> None:
    delta, heads = fields.table("linear_attn_config"), fields.integer("num_attention_heads")
    for key, given in GIVEN.items():
        if fields.value(key) != given:
            raise fields.fault(key, repr(given))
    if delta.integer("num_heads") != heads:
        raise delta.fault("num_heads", f"the {heads} of num_attention_heads")
    for key, name in INTEGERS.items():
        writer.add_uint32(f"{writer.arch}.{key}", fields.integer(name))
    for key, name in NUMBERS.items():
        writer.add_float32(f"{writer.arch}.{key}", fields.number(name))
    rope = fields.integer("qk_rope_head_dim")
    writer.add_key_length(fields.integer("kv_lora_rank") + rope)
    writer.add_key_length_mla(fields.integer("qk_nope_head_dim") + rope)
    latent, layers = delta.value("full_attn_layers"), fields.integer("num_hidden_layers")
    if not isinstance(latent, list):
        raise delta.fault("full_attn_layers", "a list of layers")
    writer.add_head_count_kv([int(number + 1 in latent) for number in range(layers)])  # 0 in layers of delta attention
    writer.add_ssm_conv_kernel(delta.integer("short_conv_kernel_size"))
    writer.add_kda_head_dim(delta.integer("head_dim"))
    if delta.has("gate_lower_bound"):
        writer.add_float32(f"{writer.arch}.kda.gate_lower_bound", delta.number("gate_lower_bound"))
    writer.add_expert_weights_norm(fields.true("moe_renormalize"))
    writer.add_uint32(f"{writer.arch}.expert_gating_func", SIGMOID)
