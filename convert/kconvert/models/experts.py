"""The routed experts of a model, as AMX weights hold them, and what stays beside them, as kt-kernel's converter names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kconvert.errors import KconvertError
from kconvert.models.amx import PROJECTIONS
from kconvert.models.model import Model, Weight
from kconvert.models.sorting import Plain


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a model, all of one shape; `layers` maps each layer to its number of experts."""

    weights: tuple[Weight, ...]
    hidden: int
    intermediate: int
    layers: Mapping[int, int]


def routed_experts(model: Model) -> Experts:
    """The gate, up and down of every routed expert, found by role; KconvertError when there are none, or not of one shape.

    Those of the layers behind the last (MTP) stay out, as kt-kernel's converter leaves them.
    """
    root, last = model.checkpoint.root, model.layers
    weights = tuple(w for w in model.weights if w.role.partition(".")[0] == "expert" and (w.layer or 0) < last)
    unknown = [w for w in weights if w.role.partition(".")[2] not in PROJECTIONS or w.expert is None or w.layer is None]
    if not weights or unknown:
        what = f"those of {model.manifest.name} are not supported" if unknown else "the names of its weights show none"
        raise KconvertError(
            f"{root}: repack-amx needs routed experts with a gate, an up and a down matrix each, but {what}"
        )
    found: dict[int, set[tuple[str, int]]] = {}
    for weight in weights:
        found.setdefault(weight.layer or 0, set()).add((weight.role, weight.expert or 0))
    layers = {layer: 1 + max(expert for _, expert in pairs) for layer, pairs in sorted(found.items())}
    hidden, intermediate = next((w.rows, w.cols) for w in weights if w.role == "expert.down")
    for weight in weights:
        wanted = (hidden, intermediate) if weight.role == "expert.down" else (intermediate, hidden)
        if (weight.rows, weight.cols) != wanted:
            raise KconvertError(
                f"{root}: {weight.name!r} is [{weight.rows}, {weight.cols}], not {list(wanted)} as others are"
            )
    for layer, count in layers.items():
        if len(found[layer]) != len(PROJECTIONS) * count:
            raise KconvertError(f"{root}: layer {layer} lacks weights of some of its {count} experts; fetch the rest")
    return Experts(weights, hidden, intermediate, layers)


def experts_in(weights: Iterable[Weight]) -> Mapping[tuple[int | None, str], int]:
    """How many routed experts have a matrix of this role in this layer."""
    return Counter((weight.layer, weight.role) for weight in weights if weight.expert is not None)


def rest_of(model: Model) -> Iterator[Plain]:
    """Every tensor that belongs to no routed expert, to be copied under the name that kt-kernel's converter gives it."""
    items: Iterable[Weight | Plain] = (*model.weights, *model.plain)
    for item in items:
        if item.role.partition(".")[0] != "expert":
            below = None if isinstance(item, Weight) else item.below
            for tensor in item.copied if isinstance(item, Weight) else (item.tensor,):
                yield Plain(tensor._replace(name=rest_name(tensor.name)), item.role, item.layer, below=below)


def rest_name(name: str) -> str:
    """What kt-kernel's converter calls a tensor that is no routed expert's."""
    name = name.replace("language_model.", "")
    return name.replace("model.layers.", "blk.").replace("model.", "") if name.startswith("model.") else name
