"""What the experts' matrices are called in a checkpoint, and which of them a configuration means.

transformers fuses the experts of a checkpoint when it loads one and takes them apart when it saves; where each matrix goes
is asked of its own conversion, with a probe of numbered values. Of several names for a weight those of the checkpoint that
training began with are kept. A model that has a manifest must have all its experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import KEYS, quantization_tables, read_quantization
from kconvert.errors import KconvertError
from kconvert.formats import QUANTISED_SUFFIXES, Format, from_scheme
from kconvert.formats.base import Scheme
from kconvert.models.catalogue import manifest_for
from kconvert.models.manifest import UnknownSizeError
from kconvert.models.rules import Match
from kconvert_qat.config import QATConfig
from kconvert_qat.experts import ExpertWeight, plain_name
from kconvert_qat.grids.native import is_on_grid


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

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix in `tensor`, which is laid out as the weight is; a view."""
        return self.weight.matrix(tensor, self.expert, self.piece)


def matrices_of(model: nn.Module, weights: Iterable[ExpertWeight]) -> list[Matrix]:
    """Every matrix in `weights`; KconvertError when the model's manifest knows of experts that are not among them."""
    weights = list(weights)
    spelled = _ask_transformers(model, [weight for weight in weights if weight.stacked])
    matrices = [matrix for weight in weights for matrix in _named(weight, spelled)]
    config = config_of(model)
    if config.get("model_type") is not None:
        try:
            names = manifest_for(config).bind(config)
        except UnknownSizeError:  # transformers has a config.json of its own (MiniMax-M3)
            return matrices
        found = {matrix.name for matrix in matrices} | {matrix.weight.key for matrix in matrices}
        missing = [name for name in names.missing(found) if _is_expert(names.linear(name))]
        if missing:  # unless transformers only saves them under names of its own
            spelling = published_spelling(model, None)
            found = {spelling(f"{name}.weight").removesuffix(".weight") for name in found}
            missing = [name for name in missing if name not in found]
        if missing:
            rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise KconvertError(f"the model has no {missing[0]!r}{rest}, which its configuration demands")
    return matrices


def _is_expert(match: Match | None) -> bool:
    return match is not None and match.rule.role.partition(".")[0] == "expert"


def config_of(model: nn.Module) -> dict[str, Any]:
    """The model's config.json as it would be saved; empty for a module without one."""
    model = base_model(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or not hasattr(config, "to_json_string"):
        return {}
    table: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return {**table, "architectures": [plain_class(model).__name__], "dtype": dtype}


def base_model(model: Any) -> Any:
    """The model inside PEFT's and torch.compile's wrappers."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_class(model: nn.Module) -> type:
    """The model's own class, without what FSDP2 makes of it."""
    return next(base for base in type(model).__mro__ if not base.__name__.startswith("FSDP"))


def _named(weight: ExpertWeight, spelled: Mapping[tuple[str, int, str], str]) -> Iterator[Matrix]:
    if not weight.stacked:
        yield Matrix(weight.path, weight, 0, weight.pieces[0])
        return
    for expert in range(weight.tensor.shape[0]):
        for piece in weight.pieces:
            name = spelled.get((weight.key, expert, piece)) or f"{weight.path}.{expert}.{piece}_proj"
            yield Matrix(name, weight, expert, piece)


def _ask_transformers(model: nn.Module, weights: Iterable[ExpertWeight]) -> dict[tuple[str, int, str], str]:
    """(weight, expert, piece) -> name, but for weights that transformers keeps fused in the checkpoints of this model.

    All are asked for at once, because it saves some together (Ernie 4.5 VL: experts for text and for images in one list).
    """
    places: list[tuple[str, int, str]] = []
    probes = {}
    for weight in weights:
        experts, count, first = weight.tensor.shape[0], len(weight.pieces), len(places)
        places += [(weight.key, expert, piece) for expert in range(experts) for piece in weight.pieces]
        probe = torch.arange(first, len(places)).view(experts, count, 1)
        probes[weight.key] = probe.mT if weight.transposed else probe
    spelled = as_saved(model, probes)
    return {
        places[int(value.item())]: name.removesuffix(".weight") for name, value in spelled.items() if value.numel() == 1
    }


def as_saved(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the model's state dict as they are called and laid out in its checkpoint."""
    base = base_model(model)
    if not hasattr(base, "save_pretrained"):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    try:
        saved: dict[str, torch.Tensor] = revert_weight_conversion(base, tensors)
    except ValueError:
        raise KconvertError(
            f"transformers saves the experts of {plain_class(base).__name__} together; let the targets mean all of them"
        ) from None
    return saved


def published_spelling(model: nn.Module, source: Checkpoint | None) -> Callable[[str], str]:
    """Turns the name under which transformers would save a weight into its name in `source`, else in the model's manifest.

    transformers takes several names for one weight, and the one that it saves need not be the published one: it calls
    the dense layer of Kimi-Linear `block_sparse_moe`, as if it had experts.
    """
    return spelling_of(model, _published(config_of(model), source))


def spelling_of(model: nn.Module, published: Iterable[str]) -> Callable[[str], str]:
    """The same, with these names for the weights."""
    base = base_model(model)
    if not hasattr(base, "save_pretrained"):
        return lambda name: name
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    prefix = f"{base.base_model_prefix}."  # which some releases leave out, as DeepSeek-V4's
    renamings = [change for change in get_model_conversion_mapping(base) if isinstance(change, WeightRenaming)]

    def read_as(name: str) -> str:
        renamed: str = rename_source_key(name, renamings, [])[0]
        return renamed.removeprefix(prefix)

    known = {read_as(name): name for name in published}

    def spelt(name: str) -> str:
        return known.get(read_as(name)) or known.get(read_as(name.removeprefix(prefix)), name)

    return spelt


def _published(config: dict[str, Any], source: Checkpoint | None) -> Iterator[str]:
    """Names of weights, with `.weight` where they are Linears, whatever encoding spells them."""
    if source is None:
        for name, match in manifest_for(config).bind(config).expected():
            yield name if match.rule.dtype else f"{name}.weight"
        return
    for name in source.tensors:
        module, _, suffix = name.rpartition(".")
        yield f"{module}.weight" if suffix in QUANTISED_SUFFIXES else name


def plain_tensors(model: nn.Module, weights: Iterable[ExpertWeight], apart: bool = True) -> dict[str, torch.Tensor]:
    """Everything in the model's state dict but `weights`, as it is called in the checkpoint; tied weights once.

    Biases of fused experts are taken `apart`, for each matrix its own.
    """
    weights = list(weights)
    state = {plain_name(key): value for key, value in base_model(model).state_dict().items()}
    if hasattr(base_model(model), "save_pretrained"):
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        state = remove_tied_weights_from_state_dict(state, base_model(model))
    for weight in weights:
        del state[weight.key]
    rest = as_saved(model, state)
    for weight in weights if apart else ():
        if weight.stacked and (bias := rest.pop(f"{weight.key}_bias", None)) is not None:
            rest.update(_split_bias(weight, bias))
    return rest


def _split_bias(weight: ExpertWeight, bias: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The bias [experts, out] of fused experts, for each of their matrices."""
    columns = bias.unsqueeze(-2 if weight.transposed else -1)
    for expert in range(len(bias)):
        for piece in weight.pieces:
            yield f"{weight.path}.{expert}.{piece}_proj.bias", weight.matrix(columns, expert, piece).squeeze(-1)


def select(weights: Iterable[ExpertWeight], matrices: Iterable[Matrix], config: QATConfig) -> list[ExpertWeight]:
    """The weights that the targets mean; KconvertError when there are none, or only some matrices of a parameter."""
    wanted: dict[int, set[bool]] = {}
    for matrix in matrices:
        hit = any(target in ("expert", matrix.role) or fnmatchcase(matrix.name, target) for target in config.targets)
        wanted.setdefault(id(matrix.weight), set()).add(hit)
    chosen = []
    for weight in weights:
        if wanted[id(weight)] == {True, False}:
            raise KconvertError(
                f"the targets {', '.join(config.targets)} mean a part of {weight.key} only, which is one parameter"
            )
        if True in wanted[id(weight)]:
            chosen.append(weight)
    if not chosen:
        raise KconvertError(f"the targets {', '.join(config.targets)} mean none of the model's experts")
    return chosen


def _format(scheme: Scheme | None) -> Format | None:
    try:
        return from_scheme(scheme) if scheme else None
    except ValueError:  # an encoding that nobody knows
        return None


def check_grid(config_json: Mapping[str, Any], config: QATConfig, matrices: Iterable[Matrix]) -> None:
    """KconvertError when a quantised checkpoint's config.json has another grid for one of the matrices than `config`."""
    if not any(quantization_tables(config_json)):
        return
    if (manifest := manifest_for(dict(config_json))).has_encoded_stacks(config_json):
        if config.grid != manifest.stacked_method:
            raise KconvertError(
                f"config.json: {KEYS[0]} has experts in stacks of {manifest.stacked_method}, but the QAT grid is {config.label}"
            )
        return
    quantization = read_quantization(config_json)
    for matrix in matrices:
        scheme = quantization.scheme_for(matrix.name)
        format = _format(scheme)
        if format is None or not is_on_grid(format, config):
            have = format.label if format else scheme or "not quantised"
            raise KconvertError(
                f"config.json: {KEYS[0]} has {matrix.name!r} as {have}, but the QAT grid is {config.label}"
            )
