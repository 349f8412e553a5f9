"""Whether a model fits into the memory of some GPUs: its weights, and the cache of one sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kconvert.errors import KconvertError, counted, human
from kconvert.serving.contents import Contents
from kconvert.serving.table import Engine

CACHE_BYTES = 2  # of a value: BF16
CONTEXT_KEYS = ("max_position_embeddings", "model_max_length", "seq_length")


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes on each GPU: those of weights, those that the engine may fill, and of the cache for a token (0: not known)."""

    weights: int
    usable: int
    token: int

    @property
    def tokens(self) -> int:
        return max(0, self.usable - self.weights) // self.token if self.token else 0


def token_bytes(contents: Contents, gpus: int) -> int:
    """The cache of a token on each of `gpus`; 0 where attention is of a kind whose cache is not one entry a token and layer."""
    special = ("linear_attn_config", "compress_ratios", "layer_types", "full_attention_interval", "sliding_window")
    layers = contents.number("num_hidden_layers")
    if layers is None or any(contents.section.get(key) for key in special):
        return 0
    latent, rope = contents.number("kv_lora_rank"), contents.number("qk_rope_head_dim")
    if latent is not None:
        return layers * (latent + (rope or 0)) * CACHE_BYTES  # the same on every GPU
    heads = contents.number("num_attention_heads")
    kept = contents.number("num_key_value_heads", "num_attention_heads")
    hidden = contents.number("hidden_size")
    if heads is None or kept is None or hidden is None:
        return 0
    size = contents.number("head_dim") or hidden // heads
    return layers * 2 * math.ceil(kept / gpus) * size * CACHE_BYTES


def check_room(engine: Engine, contents: Contents, weights: int, gpus: int, memory: int, context: int | None) -> Room:
    """The room on `gpus` of `memory` bytes each for these bytes of weights; KconvertError where it is too little."""
    usable = int(memory * engine.share)
    room = Room(math.ceil(weights / gpus), usable, token_bytes(contents, gpus))
    have = f"{counted(gpus, 'GPU')} of {human(memory)}"
    if room.weights >= usable:
        least, heads = math.ceil(weights / usable), contents.number("num_attention_heads")
        able = least if heads is None else next((n for n in range(least, heads + 1) if heads % n == 0), None)
        raise KconvertError(
            f"{human(weights)} of weights do not fit into {have}, of which {engine.title} fills {engine.share:.0%}: that takes "
            f"{human(weights / engine.share / gpus)} for each of {gpus}"
            + ("" if able is None else f", or {able} of this size")
        )
    wanted = context or contents.number(*CONTEXT_KEYS) or 0
    if room.token and room.tokens < wanted:
        whose = "asked for" if context else "of the model's context"
        raise KconvertError(
            f"{have} hold {human(weights)} of weights and the cache of {room.tokens:,} tokens, not the {wanted:,} {whose}; "
            f"give {f'--context {room.tokens} or ' if room.tokens else ''}more GPUs"
        )
    return room
