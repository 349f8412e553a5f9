"""The weights and tensors of two checkpoints, each with its counterpart, and which of them a sample takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from kconvert.formats.dense import Dense
from kconvert.models.model import Model, Weight
from kconvert.models.sorting import Plain

Pair: TypeAlias = tuple[Weight, Weight] | tuple[Plain, Plain]  # of the source and of the output


def relate(original: Model, converted: Model) -> tuple[list[Pair], list[str]]:
    """Every weight and tensor of the source with its counterpart of the same shape; and what has none."""
    root = converted.checkpoint.title
    weights = {weight.name: weight for weight in original.weights}
    plain = {item.tensor.name: item for item in original.plain}
    converted_weights, converted_plain = _as_in(weights, converted)
    wanted, found = weights.keys() | plain.keys(), converted_weights.keys() | converted_plain.keys()
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    faults = [f"{root}: {missing[0]!r} of the source is missing ({len(missing)} in all)"] if missing else []
    faults += [f"{root}: {extra[0]!r} is not in the source ({len(extra)} such in all)"] if extra else []
    every: list[Pair] = [
        (weight, converted_weights[name]) for name, weight in weights.items() if name in converted_weights
    ]
    every += [(item, converted_plain[name]) for name, item in plain.items() if name in converted_plain]
    pairs = []
    for pair in every:
        ours, theirs = _spelled(pair[0]), _spelled(pair[1])
        if ours[1] == theirs[1]:
            pairs.append(pair)
        else:
            faults.append(f"{root}: {' is '.join(theirs)}, in the source {' is '.join(ours)}")
    return pairs, faults


def _as_in(weights: Mapping[str, Weight], converted: Model) -> tuple[dict[str, Weight], dict[str, Plain]]:
    """The output's weights and plain tensors, told apart and called as in the source.

    A manifest that demands no names takes an unquantised matrix for a plain tensor.
    """
    found = {weight.name: weight for weight in converted.weights}
    plain = {item.tensor.name: item for item in converted.plain}
    for name in weights.keys() - found.keys():
        if (item := plain.pop(f"{name}.weight", None)) is not None:
            *stack, rows, cols = item.tensor.shape if len(item.tensor.shape) in (2, 3) else (0, 0)
            format = Dense(item.tensor.dtype, stack[0] if stack else None)
            found[name] = Weight(name, item.role, math.prod((*stack, rows)), cols, format, (item.tensor,))
    for theirs, ours in _renamed(weights, found).items():
        found[ours] = found.pop(theirs)
    return found, plain


def _renamed(weights: Mapping[str, Weight], found: Mapping[str, Weight]) -> dict[str, str]:
    """What experts of the output are called in the source, where that is something else: each is the only one at its place."""
    ours = _by_place(weights[name] for name in weights.keys() - found.keys())
    theirs = _by_place(found[name] for name in found.keys() - weights.keys())
    return {theirs[place]: ours[place] for place in theirs.keys() & ours.keys()}


def _by_place(weights: Iterable[Weight]) -> dict[tuple[str, int | None, int], str]:
    """The names of experts by role, layer and number, without those that share theirs."""
    names: dict[tuple[str, int | None, int], list[str]] = {}
    for weight in weights:
        if weight.expert is not None:
            names.setdefault((weight.role, weight.layer, weight.expert), []).append(weight.name)
    return {place: alike[0] for place, alike in names.items() if len(alike) == 1}


def _spelled(item: Weight | Plain) -> tuple[str, str]:
    """Its name, and what must be the same on both sides: the shape, and of a plain tensor the dtype."""
    if isinstance(item, Weight):
        return repr(item.name), f"[{item.rows}, {item.cols}]"
    return repr(item.tensor.name), f"{item.tensor.dtype} {list(item.tensor.shape)}"


def choose(pairs: list[Pair], sample: float) -> list[Pair]:
    """The first of each role, and of the rest by a hash of the name, so that every run takes the same."""
    chosen: list[Pair] = []
    roles: set[str] = set()
    for pair in pairs:
        item = pair[0]
        name = item.name if isinstance(item, Weight) else item.tensor.name
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        if item.role not in roles or number < sample * 2**64:
            chosen.append(pair)
        roles.add(item.role)
    return chosen
