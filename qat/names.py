"""What the experts' matrices are called in a checkpoint, and which of them a configuration means.

transformers fuses the experts of a checkpoint when it loads one and takes them apart when it saves; where each matrix goes
is asked of its own conversion, with a probe of numbered values. A model that has a manifest must have all its experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from kconvert.catalogue import manifest_for
from kconvert.checkpoint.config import KEYS, quantization_tables, read_quantization
from kconvert.errors import KconvertError
from kconvert.formats import from_scheme
from kconvert.formats.packed import Packed
from kconvert.qat.config import QATConfig
from kconvert.qat.experts import ExpertWeight, plain_name


@dataclass(frozen=True)
class Matrix:
    """One expert's matrix [out, in]: its name in the checkpoint, without `.weight`, and its place in the model."""

    name: str
    weight: ExpertWeight
    expert: int
    piece: str

    @property
    def role(self) -> str:
        return f"expert.{self.piece}"


def matrices_of(model: nn.Module, weights: Iterable[ExpertWeight]) -> list[Matrix]:
    """Every matrix in `weights`; KconvertError when the model's manifest knows of experts that are not among them."""
    matrices = [matrix for weight in weights for matrix in _named(model, weight)]
    config = config_of(model)
    if config.get("model_type") is not None:
        names = manifest_for(config).bind(config)
        missing = [name for name in names.missing({matrix.name for matrix in matrices}) if _is_expert(names.linear(name))]
        if missing:
            rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise KconvertError(f"the model has no {missing[0]!r}{rest}, which its configuration demands")
    return matrices


def _is_expert(match: Any) -> bool:
    return match is not None and match.rule.role.partition(".")[0] == "expert"


def config_of(model: nn.Module) -> dict[str, Any]:
    """The model's config.json; empty for a module without one."""
    config = getattr(base_model(model), "config", None)
    table = config.to_dict() if hasattr(config, "to_dict") else {}
    return {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in table.items()}


def base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's and torch.compile's wrappers."""
    model = getattr(model, "_orig_mod", model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(inner, nn.Module)
    return inner


def _named(model: nn.Module, weight: ExpertWeight) -> list[Matrix]:
    if not weight.stacked:
        return [Matrix(weight.path, weight, 0, weight.pieces[0])]
    experts = weight.tensor.shape[0]
    names = _ask_transformers(model, weight, experts)
    return [
        Matrix(names.get((expert, k)) or f"{weight.path}.{expert}.{piece}_proj", weight, expert, piece)
        for expert in range(experts)
        for k, piece in enumerate(weight.pieces)
    ]


def _ask_transformers(model: nn.Module, weight: ExpertWeight, experts: int) -> dict[tuple[int, int], str]:
    """(expert, piece) -> name; empty when transformers keeps the experts of this model fused in its checkpoints."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    model, count = base_model(model), len(weight.pieces)
    if not hasattr(model, "config"):
        return {}
    probe = torch.arange(experts * count, dtype=torch.float32).view(experts, count, 1)
    spelled = revert_weight_conversion(model, {weight.key: probe.mT if weight.transposed else probe})
    if any(value.numel() != 1 for value in spelled.values()):
        return {}
    return {divmod(int(value.item()), count): name.removesuffix(".weight") for name, value in spelled.items()}  # type: ignore[misc]


def select(weights: Iterable[ExpertWeight], matrices: Iterable[Matrix], config: QATConfig) -> list[ExpertWeight]:
    """The weights that the targets mean; KconvertError when there are none, or only some matrices of a parameter."""
    wanted: dict[int, set[bool]] = {}
    for matrix in matrices:
        hit = any(target in ("expert", matrix.role) or fnmatchcase(matrix.name, target) for target in config.targets)
        wanted.setdefault(id(matrix.weight), set()).add(hit)
    chosen = []
    for weight in weights:
        if wanted[id(weight)] == {True, False}:
            raise KconvertError(f"the targets {', '.join(config.targets)} mean a part of {weight.key} only, which is one parameter")
        if True in wanted[id(weight)]:
            chosen.append(weight)
    if not chosen:
        raise KconvertError(f"the targets {', '.join(config.targets)} mean none of the model's experts")
    return chosen


def check_grid(config_json: Mapping[str, Any], config: QATConfig, matrices: Iterable[Matrix]) -> None:
    """KconvertError when a quantised checkpoint's config.json has another grid for one of the matrices than `config`."""
    if not any(True for _ in quantization_tables(config_json)):
        return
    quantization = read_quantization(config_json)
    for matrix in matrices:
        scheme = quantization.scheme_for(matrix.name)
        format = from_scheme(scheme) if scheme else None
        if format != Packed(config.group_size):
            have = format.label if format else "not quantised"
            raise KconvertError(
                f"config.json: {KEYS[0]} has {matrix.name!r} as {have}, but the QAT grid is int4 group {config.group_size}"
            )
