"""The role of a weight that no manifest lists, by the words that model families share in their names.

Experts are `experts.E.PROJECTION` (or `experts.PROJECTION.E`), shared experts and attention have words of their own; what has
none of these words is a Linear of which no more is known.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

PROJECTIONS = {
    **{"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"},
    **{"gate": "gate", "up": "up", "down": "down", "gate_up_proj": "gate_up"},
}
LAYERS = frozenset({"layers", "layer", "h", "blocks", "block"})
TOWERS = frozenset({"visual", "vision", "vision_tower", "vision_model", "audio_tower"})
PROJECTORS = frozenset({"mm_projector", "multi_modal_projector", "patch_merge_mlp"})
MTP = frozenset({"mtp", "nextn"})
SHARED = frozenset({"shared_experts", "shared_expert", "share_expert", "shared_mlp"})
ATTENTION = frozenset({"self_attn", "attn", "attention", "self_attention", "linear_attn", "cross_attn"})
DENSE = frozenset({"mlp", "feed_forward", "ffn"})
# What may stand between `experts` and the name of a matrix, and a way to write the number.
WITHIN = frozenset({"local_experts", "deepspeed_experts", "mlp", "ffn"})
NUMBERED = re.compile(r"\.experts?_([0-9]{1,9})\.")
# Words that a name has somewhere -> the role; the first that fits.
PLACES = ((TOWERS, "vision"), (PROJECTORS, "projector"), (MTP, "mtp"), (SHARED, "shared"), (ATTENTION, "attention"))
WHOLE = {
    **dict.fromkeys(("embed_tokens", "word_embeddings", "wte", "embed", "tok_embeddings"), "embedding"),
    **{"lm_head": "lm_head", "gate": "router", "router": "router"},
}
# Last words of the roles of Linears whose rows engines lay into one matrix, in models of every kind.
FUSED = (("gate", "up"), ("q", "k", "v"), ("q_a", "kv_a", "kv"))
MEMBER = {member: group for group in FUSED for member in group}


class Role(NamedTuple):
    name: str
    layer: int | None = None
    expert: int | None = None

    @property
    def is_expert(self) -> bool:
        """Whether it is one matrix of one routed expert."""
        return self.expert is not None


def guess(weight: str) -> Role:
    """What the weight called so is in its model."""
    words = NUMBERED.sub(r".experts.\1.", weight).split(".")
    layer = next((int(n) for word, n in pairwise(words) if word in LAYERS and _is_number(n)), None)
    if "experts" in words and MTP.isdisjoint(words):
        return _expert(words[words.index("experts") + 1 :], layer)
    return Role(_name(words), layer)


def fusion(role: str, name: str) -> object:
    """What the names of weights have in common that engines fuse; None of one that they leave by itself."""
    fused = MEMBER.get(role.rpartition(".")[2])
    if fused is None:
        return None
    words = name.split(".")
    return fused, *([word for word in words if word not in PROJECTIONS] if "gate" in fused else words[:-1])


def _name(words: list[str]) -> str:
    """The role of what is no routed expert's, or one's behind the last layer."""
    last = words[-1]
    projection = PROJECTIONS.get(last)
    is_dense = projection is not None and not DENSE.isdisjoint(words[-2:-1])
    name = next((name for place, name in PLACES if not place.isdisjoint(words)), None)
    if name is None:
        name = WHOLE.get(last) or ("dense" if is_dense else "linear")
    detail = {"shared": projection or last, "dense": projection, "attention": last.removesuffix("_proj")}.get(name)
    return f"{name}.{detail}" if detail else name


def _expert(rest: list[str], layer: int | None) -> Role:
    """`rest` is what follows `experts` in the name: number and projection in either order, or the name of a stack."""
    numbers = [int(word) for word in rest if _is_number(word)]
    words = [word for word in rest if not _is_number(word) and word not in WITHIN]
    if len(words) != 1 or len(numbers) > 1:
        return Role("linear", layer)
    expert = numbers[0] if numbers else None
    return Role(f"expert.{PROJECTIONS.get(words[0], words[0])}", layer, expert)


def _is_number(word: str) -> bool:
    """Whether it may count layers or experts; int() refuses numbers that are too long."""
    return word.isdecimal() and len(word) < 10
