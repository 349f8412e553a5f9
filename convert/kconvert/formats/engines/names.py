"""What llama.cpp calls the modules of a model: by the table of the `gguf` package, or for those it lacks by one of facts here.

Source of what is here: https://github.com/ggml-org/llama.cpp, `src/llama-arch.cpp`, `src/models/*.cpp` and `conversion/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kconvert.errors import KconvertError

# Models that the gguf package (0.19) does not know: the source's module -> llama.cpp's, without `.weight`; of a layer by number
# what stands behind `layers.N.` and `blk.N.`.
WHOLE: Mapping[str, Mapping[str, str]] = {
    "deepseek4": {
        "embed": "token_embd",
        "norm": "output_norm",
        "head": "output",
        **{f"hc_head_{part}": f"output_hc_{part}" for part in ("fn", "base", "scale")},
    },
    "kimi-k3": {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.output_attn_res_norm": "output_res_score",
    },
}
LAYERS: Mapping[str, Mapping[str, str]] = {
    "deepseek4": {
        "attn_norm": "attn_norm",
        "attn.attn_sink": "attn_sinks",
        "attn.wq_a": "attn_q_a",
        "attn.q_norm": "attn_q_a_norm",
        "attn.wq_b": "attn_q_b",
        "attn.wkv": "attn_kv",
        "attn.kv_norm": "attn_kv_a_norm",
        "attn.wo_a": "attn_output_a",
        "attn.wo_b": "attn_output_b",
        "attn.indexer.wq_b": "indexer.attn_q_b",
        "attn.indexer.weights_proj": "indexer.proj",
        **{
            f"attn.{theirs}.{part}": f"{ours}_{name}"
            for theirs, ours in (("compressor", "attn_compressor"), ("indexer.compressor", "indexer_compressor"))
            for part, name in (("wkv", "kv"), ("wgate", "gate"), ("ape", "ape"), ("norm", "norm"))
        },
        "ffn_norm": "ffn_norm",
        "ffn.gate": "ffn_gate_inp",
        "ffn.gate.e_score_correction": "exp_probs_b",
        "ffn.gate.tid2eid": "ffn_gate_tid2eid",
        **{
            f"ffn.shared_experts.{part}": f"ffn_{name}_shexp"
            for part, name in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
        },
        **{f"hc_{side}_{part}": f"hc_{side}_{part}" for side in ("attn", "ffn") for part in ("fn", "base", "scale")},
    },
    "kimi-k3": {
        "input_layernorm": "attn_norm",
        "self_attention_res_norm": "attn_res_score",
        "mlp_res_norm": "ffn_res_score",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in ("q", "k", "v", "q_a", "q_b", "kv_b", "k_b", "v_b")},
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.g_proj": "attn_gate",
        "self_attn.delta_g_proj": "ssm_g",
        **{f"self_attn.{part}_conv1d": f"ssm_conv1d_{part}" for part in "qkv"},
        "self_attn.f_a_proj": "ssm_f_a",
        "self_attn.f_b_proj": "ssm_f_b",
        "self_attn.b_proj": "ssm_beta",
        "self_attn.A_log": "ssm_a",
        "self_attn.dt_proj": "ssm_dt",
        "self_attn.o_norm": "ssm_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.gate.e_score_correction": "exp_probs_b",
        **{f"block_sparse_moe.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
        **{f"block_sparse_moe.routed_expert_{part}_proj": f"ffn_routed_{part}" for part in ("down", "up")},
        "block_sparse_moe.routed_expert_norm": "ffn_routed_norm",
    },
}
# Whose tensors are those of another model, which gguf knows.
LIKE: Mapping[str, str] = {"deepseek32": "glm-dsa"}


def names_of(architecture: str, layers: int) -> Callable[[str], str | None]:
    """From a module's name to llama.cpp's, in a model of so many layers; None for one that it has not.

    KconvertError where the gguf package is too old to know the architecture.
    """
    if architecture in LAYERS:
        table = dict(WHOLE[architecture])
        for number in range(layers):
            for old, new in LAYERS[architecture].items():
                table[f"layers.{number}.{old}"] = table[f"model.layers.{number}.{old}"] = f"blk.{number}.{new}"
        return table.get
    import gguf

    known = LIKE.get(architecture, architecture)
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == known), None)
    if kind is None:
        raise KconvertError(
            f"the gguf package that is installed does not know {known!r}; install gguf 0.19 or a later one"
        )
    return gguf.get_tensor_name_map(kind, layers).get_name
