"""Which Linears engines fuse into one: they must share what is one number of the whole weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kconvert.models.model import Weight
from kconvert.models.roles import fusion
from kconvert.planning.steps import Mate


def mates(weights: Iterable[Weight]) -> Mapping[str, tuple[Mate, ...]]:
    """For each weight, by name, those that are fused with it and itself; one tuple for all of these."""
    groups: dict[object, list[Mate]] = {}
    for weight in weights:
        mate = Mate(weight.name, weight.rows, weight.cols, weight.format, weight.tensors)
        groups.setdefault(fusion(weight.role, weight.name) or weight.name, []).append(mate)
    return {mate.name: group for group in map(tuple, groups.values()) for mate in group}
