"""Which Linears engines fuse into one: they must share what is one number of the whole weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kconvert.models.model import Weight
from kconvert.models.roles import PROJECTIONS
from kconvert.planning.steps import Mate

# Last words of the roles of Linears whose rows lie in one matrix, for models of every kind.
FUSED = (("gate", "up"), ("q", "k", "v"), ("q_a", "kv_a", "kv"))
MEMBER = {member: group for group in FUSED for member in group}


def mates(weights: Iterable[Weight]) -> Mapping[str, tuple[Mate, ...]]:
    """For each weight, by name, those that are fused with it and itself; one tuple for all of these."""
    groups: dict[object, list[Mate]] = {}
    for weight in weights:
        mate = Mate(weight.name, weight.rows, weight.cols, weight.format, weight.tensors)
        groups.setdefault(_fusion(weight), []).append(mate)
    return {mate.name: group for group in map(tuple, groups.values()) for mate in group}


def _fusion(weight: Weight) -> object:
    """What the names of fused weights have in common; the name of any other."""
    fused = MEMBER.get(weight.role.rpartition(".")[2])
    if fused is None:
        return weight.name
    words = weight.name.split(".")
    return fused, *([word for word in words if word not in PROJECTIONS] if "gate" in fused else words[:-1])
