"""What a GGUF says of its model against config.json and the tokenizer beside the source's weights.

Whoever made the file: each key that can be told from the source is held to it; those that cannot are the maker's own business.
It goes a way of its own, through neither the code that writes GGUF files nor the `gguf` package.
Source: https://github.com/ggml-org/llama.cpp, `src/llama-arch.cpp`, `src/llama-hparams.h` and `conversion/`.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kconvert.checkpoint.gguf_files import GgufCheckpoint
from kconvert.checkpoint.pretokenizers import name_of
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import counted
from kconvert.models.model import Model

LOG_MUL = 0.1  # llama.cpp's number for YaRN is this times DeepSeek's mscale_all_dim
SIGMOID, SQRT_SOFTPLUS = 2, 4
# Key without the architecture -> the keys of config.json, of which the first that is there says the same.
SAME = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "expert_count": ("n_routed_experts", "num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok", "num_experts_per_token"),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts"),
    "expert_weights_scale": ("routed_scaling_factor",),
}
LATENT = {
    "leading_dense_block_count": ("first_k_dense_replace",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "rope.dimension_count": ("qk_rope_head_dim",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
INDEXER = {
    "attention.indexer.head_count": ("index_n_heads",),
    "attention.indexer.key_length": ("index_head_dim",),
    "attention.indexer.top_k": ("index_topk",),
}
SAME_BY_ARCHITECTURE = {
    "deepseek2": LATENT,
    "deepseek32": {**LATENT, **INDEXER},
    "glm-dsa": {**LATENT, **INDEXER},
    "deepseek4": {
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "attention.q_lora_rank": ("q_lora_rank",),
        "attention.sliding_window": ("sliding_window",),
        "attention.output_group_count": ("o_groups",),
        "attention.output_lora_rank": ("o_lora_rank",),
        "attention.compress_rope_freq_base": ("compress_rope_theta",),
        **INDEXER,
        "rope.dimension_count": ("qk_rope_head_dim",),
        "hyper_connection.count": ("hc_mult",),
        "hyper_connection.sinkhorn_iterations": ("hc_sinkhorn_iters",),
        "hyper_connection.epsilon": ("hc_eps",),
        "hash_layer_count": ("num_hash_layers",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_weights_norm": ("norm_topk_prob",),
    },
    "qwen3moe": {
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
    },
    "glm4moe": {
        "leading_dense_block_count": ("first_k_dense_replace",),
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_weights_norm": ("norm_topk_prob",),
    },
    "kimi-k3": {
        **LATENT,
        "expert_weights_norm": ("moe_renormalize",),
        "expert_latent_length": ("routed_expert_hidden_size",),
        "attention.value_length": ("kv_lora_rank",),
        "attention.value_length_mla": ("v_head_dim",),
        "attn_res.block_size": ("attn_res_block_size",),
        "activation.situ_beta": ("activation_situ_beta",),
        "activation.situ_linear_beta": ("activation_situ_linear_beta",),
    },
    "minimax-m2": {
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "rope.dimension_count": ("rotary_dim",),
        "expert_feed_forward_length": ("intermediate_size",),
    },
    "gpt-oss": {
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "attention.sliding_window": ("sliding_window",),
        "expert_feed_forward_length": ("intermediate_size",),
    },
}
# Names of llama.cpp for one way of cutting texts into words.
ALIASES = (
    {"gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"},
    {"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"},
    {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4", "glm5"},
    {"smaug-bpe", "dbrx", "chatglm-bpe"},
    {"deepseek-v3", "hunyuan-dense", "joyai-llm"},
    {"gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2"},
)
# What a file may lack: engines have an answer of their own.
OPTIONAL = ("tokenizer.chat_template", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")


@dataclass(frozen=True)
class Said:
    """`faults` are sentences on what is not as in the source, `notes` on what could not be compared or is not there."""

    faults: tuple[str, ...]
    notes: tuple[str, ...]


def compare_metadata(original: Model, checkpoint: Checkpoint) -> Said:
    """Hold the metadata of a GGUF to its source; of other checkpoints there is nothing to say."""
    if not isinstance(checkpoint, GgufCheckpoint):
        return Said((), ())
    expected = dict(_expected(original, checkpoint))
    missing = [key for key in expected if key not in checkpoint.metadata]
    if len(missing) == len(expected):
        return Said(
            (), ("it says nothing of the model but its architecture, and has no tokenizer; engines do not load it",)
        )
    title = checkpoint.root / checkpoint.name
    faults = [f"{title}: the key {key!r} is missing" for key in missing if key not in OPTIONAL]
    for key, value in expected.items():
        if key in checkpoint.metadata and (found := _difference(checkpoint, key, value)):
            faults.append(f"{title}: the key {key!r} {found}")
    absent = [key for key in missing if key in OPTIONAL]
    notes = [f"it has no {', '.join(absent)}, which the source has"] if absent else []
    if "tokenizer.ggml.tokens" not in expected:
        notes.append("its tokenizer is not compared, as the source has none that could be read")
    return Said(tuple(faults), tuple(notes))


def _expected(original: Model, checkpoint: GgufCheckpoint) -> Iterator[tuple[str, Any]]:
    """Keys, and what they may be by the source: one of several values, or for the tokenizer what is to be found."""
    config = original.manifest.section(original.checkpoint.config)
    architecture, said = checkpoint.architecture, checkpoint.metadata
    drafting = said.get(f"{architecture}.nextn_predict_layers", 0)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and isinstance(drafting, int):
        yield f"{architecture}.block_count", (layers + drafting,)
    for key, names in {**SAME, **SAME_BY_ARCHITECTURE.get(architecture, {})}.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        name = f"{architecture}.{key}"
        # What multiplies by one, or is not done, may be left out.
        if isinstance(value, int | float) and (name in said or value not in (1.0, False) or key == "expert_used_count"):
            yield name, (value,)
    own = (*_rope(config, architecture), *OWN.get(architecture, lambda _: ())(config))
    yield from ((f"{architecture}.{key}", values) for key, values in own)
    if f"{architecture}.rope.scaling.type" in said and not any(key == "rope.scaling.type" for key, _ in own):
        yield f"{architecture}.rope.scaling.type", ("none",)
    yield from _tokenizer(_Beside(original.checkpoint), config)


def _rope(config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Rotary positions; their scaling as YaRN has it."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    table = table if isinstance(table, Mapping) else {}
    base = table.get("rope_theta", config.get("rope_theta"))
    if isinstance(base, int | float):
        yield "rope.freq_base", (base,)
    if "yarn" in (table.get("rope_type"), table.get("type")):
        yield "rope.scaling.type", ("yarn",)
        yield "rope.scaling.factor", (table.get("factor"),)
        original = table.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        yield "rope.scaling.original_context_length", (original,)
        if architecture in ("deepseek2", "deepseek32") and isinstance(
            all_dim := table.get("mscale_all_dim"), int | float
        ):
            yield "rope.scaling.yarn_log_multiplier", (LOG_MUL * all_dim,)


def _latent(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Heads of latent attention: absorbed, as those of one head of keys, or as all heads have them."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "num_attention_heads")
    sizes = [config.get(name) for name in names]
    if not all(isinstance(size, int) for size in sizes):
        return
    latent, rope, nope, value, heads = (int(size or 0) for size in sizes)
    yield "attention.head_count_kv", (1, heads)
    yield "attention.key_length", (latent + rope, nope + rope)
    yield "attention.value_length", (latent, value)
    yield "expert_gating_func", (SIGMOID,)


def _compressed(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """DeepSeek-V4: what each layer compresses and where it cuts activations off, and the router's function."""
    layers, ratios, limit = (config.get(key) for key in ("num_hidden_layers", "compress_ratios", "swiglu_limit"))
    yield "expert_gating_func", (SQRT_SOFTPLUS,)
    if isinstance(layers, int) and isinstance(ratios, list):
        yield "attention.compress_ratios", dict(enumerate(ratios[:layers]))
    if isinstance(layers, int) and isinstance(limit, int | float):
        for kind in ("exp", "shexp"):
            yield f"swiglu_clamp_{kind}", dict.fromkeys(range(layers), limit)


def _indexed(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Latent attention to what indexers choose, which some layers have."""
    yield from _latent(config)
    layers, kinds = config.get("num_hidden_layers"), config.get("indexer_types")
    if isinstance(layers, int) and isinstance(kinds, list):
        yield "attention.indexer.types", {number: kind == "full" for number, kind in enumerate(kinds[:layers])}


def _delta(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Kimi-K3: which layers have latent attention, and how long keys are there; the others have no heads of keys."""
    yield "expert_gating_func", (SIGMOID,)
    sizes = [config.get(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "num_hidden_layers")]
    delta = config.get("linear_attn_config")
    if not isinstance(delta, Mapping) or not all(isinstance(size, int) for size in sizes):
        return
    latent, rope, nope, layers = (int(size or 0) for size in sizes)
    yield "attention.key_length", (latent + rope,)
    yield "attention.key_length_mla", (nope + rope,)
    for key, name in (("ssm.conv_kernel", "short_conv_kernel_size"), ("kda.head_dim", "head_dim")):
        yield key, (delta.get(name),)
    if isinstance(bound := delta.get("gate_lower_bound"), int | float):
        yield "kda.gate_lower_bound", (bound,)
    if isinstance(numbers := delta.get("full_attn_layers"), list):
        yield "attention.head_count_kv", {number: int(number + 1 in numbers) for number in range(layers)}


OWN = {"deepseek2": _latent, "deepseek32": _indexed, "deepseek4": _compressed, "glm-dsa": _indexed, "kimi-k3": _delta}


class _Beside:
    """The tokenizer's files beside the source's weights; what is not sound is as if it were not there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def text(self, name: str) -> str | None:
        if name not in self._checkpoint.side_files:
            return None
        try:
            return self._checkpoint.side_file(name).read_text()
        except (OSError, ValueError):
            return None

    def table(self, name: str) -> dict[str, Any]:
        try:
            table = json.loads(self.text(name) or "{}")
        except (ValueError, RecursionError):
            return {}
        return table if isinstance(table, dict) else {}


def _tokenizer(beside: _Beside, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys of the tokenizer, by the file that the model's class of tokenizers reads."""
    settings = beside.table("tokenizer_config.json")
    kind = settings.get("tokenizer_class") or ("TikTok" if str(config.get("model_type")).startswith("kimi") else "")
    ranks = beside.text("tiktoken.model") if "TikTok" in str(kind) else None
    table = beside.table("tokenizer.json")
    try:
        tokens, merges = (_ranked(ranks, settings), None) if ranks else _listed(table)
    except (ValueError, TypeError, KeyError, AttributeError):  # files that are no such tables
        tokens, merges = {}, None
    if tokens:
        name = "kimi-k2" if ranks else name_of(table)
        yield "tokenizer.ggml.tokens", tokens
        yield "tokenizer.ggml.pre", tuple(next((names for names in ALIASES if name in names), {name}))
    if merges:
        yield "tokenizer.ggml.merges", dict(enumerate(merges))
    for word in ("bos", "eos"):
        entry = settings.get(f"{word}_token")
        if entry and not tokens:
            continue
        content = entry.get("content") if isinstance(entry, dict) else entry
        number = next((number for number, token in tokens.items() if token == content), config.get(f"{word}_token_id"))
        if isinstance(number := number[0] if isinstance(number, list) and number else number, int):
            yield f"tokenizer.ggml.{word}_token_id", (number,)
    template = beside.text("chat_template.jinja") or settings.get("chat_template")
    if isinstance(template, str):
        yield "tokenizer.chat_template", (template,)


def _listed(table: Any) -> tuple[dict[int, str], list[str] | None]:
    """Tokens and merges of a tokenizer.json; nothing of what is no BPE."""
    if not table:
        return {}, None
    model = table["model"]
    tokens = {number: token for token, number in model["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokens | {each["id"]: each["content"] for each in table.get("added_tokens") or []}, merges


def _spelt(token: bytes) -> str:
    """Bytes as GPT-2 has them in a vocabulary: those that cannot be seen are, in their order, the letters from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    hidden = [byte for byte in range(256) if byte not in seen]
    return "".join(chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in token)


def _ranked(ranks: str, settings: Mapping[str, Any]) -> dict[int, str]:
    """Tokens by the ranks of a tiktoken.model, and those that have a name in tokenizer_config.json."""
    lines = (line.split() for line in ranks.splitlines())
    tokens = {int(line[1]): _spelt(base64.b64decode(line[0])) for line in lines if len(line) == 2}
    named = settings.get("added_tokens_decoder")
    for number, entry in (named if isinstance(named, dict) else {}).items():
        if number.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            tokens[int(number)] = entry["content"]
    return tokens


def _difference(checkpoint: GgufCheckpoint, key: str, expected: Any) -> str | None:
    """In words how a value is not what the source makes it."""
    if isinstance(expected, dict):
        found = checkpoint.items(key) or []
        wrong = [i for i, item in expected.items() if i >= len(found) or not _same(found[i], item)]
        wrong += range(len(expected), len(found)) if key.endswith("merges") else ()
        if not wrong:
            return None
        first, wanted = wrong[0], expected.get(wrong[0])
        have = repr(found[first])[:80] if first < len(found) else "nothing"
        return (
            f"has {have} as number {first}, in the source there is {wanted!r:.80} ({counted(len(wrong), 'difference')})"
        )
    value = checkpoint.metadata[key]
    if any(_same(value, one) for one in expected):
        return None
    return f"is {value!r:.80}, by the source it is {' or '.join(repr(one)[:80] for one in expected)}"


def _same(found: Any, expected: Any) -> bool:
    """Numbers as F32 has them."""
    if isinstance(found, float) and isinstance(expected, int | float):
        return abs(expected) < 3e38 and struct.pack("<f", found) == struct.pack("<f", expected)
    return type(found) is type(expected) and bool(found == expected)
