"""A transformers model filled from a checkpoint in any encoding, without a BF16 copy of it on the disk.

The experts, nearly all there is, go matrix by matrix to their places; under FSDP2 a rank decodes those of its own shard alone.
All else goes through transformers' own loader, which gets slices that are decoded when it reads them: it knows what is renamed,
fused, tied, sharded or left out.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import kconvert
from kconvert.errors import KconvertError
from kconvert_qat.attach import check_model
from kconvert_qat.experts import ExpertWeight, find_experts
from kconvert_qat.export.ranks import is_sharded, together
from kconvert_qat.export.readable import silence
from kconvert_qat.names import Matrix, base_model, matrices_of, plain_class, spelling_of

LAYER = re.compile(r"\blayers\.([0-9]{1,9})\.")


@dataclass(frozen=True)
class Places:
    """Of one parameter with experts: the names of what fills it, and of each the matrix; None for a tensor that is laid out as
    the parameter is."""

    weight: ExpertWeight
    names: tuple[str, ...]
    matrices: tuple[Matrix, ...] | None

    def fill(self, weights: kconvert.Weights) -> None:
        """What of it this process holds."""
        room, first, last = _held(self.weight.tensor)
        if self.matrices is None:
            for expert in range(first, last):
                room[expert - first].copy_(weights.rows(self.names[0], expert, expert + 1)[0])
            return
        for name, matrix in zip(self.names, self.matrices, strict=True):
            if not self.weight.stacked or first <= matrix.expert < last:
                place = self.weight.matrix(room, matrix.expert - first * self.weight.stacked, matrix.piece)
                place.copy_(weights[name])


@dataclass
class Lazy:
    """A tensor as transformers' loader takes it; the loader only logs what fails, so it is kept in `failures`."""

    slice: Any
    failures: list[KconvertError] = field(default_factory=list)

    def get_shape(self) -> list[int]:
        shape: list[int] = self.slice.get_shape()
        return shape

    def get_dtype(self) -> str:
        return str(self.slice.get_dtype())

    def __getitem__(self, key: Any) -> torch.Tensor:
        try:
            value: torch.Tensor = self.slice[key]
        except KconvertError as failure:
            self.failures.append(failure)
            raise
        return value


def load(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Fill `model`, of transformers, with the values of `source`: of a directory, the Hub or an object store, in any encoding.

    Parameters stay the same objects on the same devices, in their own dtype; those on the meta device come to `device`.
    The result is that of from_pretrained with a BF16 conversion, bit for bit. Under FSDP2 every rank calls this, before the
    first forward, and decodes its own experts; where one refuses, all do. Adapters come afterwards. Beside the model one matrix
    is in memory.

    KconvertError when the checkpoint cannot be read, when it lacks a weight of the model or has one that the model has no
    place for, and where shapes differ; then the model holds nothing of use.
    """
    check_model(model)
    with together(is_sharded(model)):
        _load(model, source, revision, _device(device))


def _device(device: Any) -> torch.device:
    """KconvertError unless there is such a one, and it has memory."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, TypeError, AssertionError, ImportError):
        raise KconvertError(f"there is no device {device!r} here; give one that torch has, such as 'cpu'") from None
    if found.type == "meta":
        raise KconvertError("the meta device holds no values; give load one that does, such as 'cpu'")
    return found


def _load(model: nn.Module, source: str | os.PathLike[str], revision: str | None, device: torch.device) -> None:
    base = base_model(model)
    if not hasattr(base, "save_pretrained"):
        raise KconvertError(f"load fills models of transformers, and {type(base).__name__} is none")
    if "disk" in (getattr(base, "hf_device_map", None) or {}).values():
        raise KconvertError("the model has weights on the disk, where load puts none; let its device_map name no disk")
    with kconvert.open(source, revision) as weights, silence(), torch.no_grad():
        places = list(_places(model, weights))
        filled = {name for place in places for name in place.names}
        rest = {name: Lazy(weights.get_slice(name)) for name in weights if name not in filled}
        _load_rest(base, rest, places, str(source), device, weights.layers)
        for place in places:
            place.fill(weights)


def _places(model: nn.Module, weights: kconvert.Weights) -> Iterator[Places]:
    """The parameters with experts that can be filled directly, and by what."""
    experts = find_experts(model)
    spelling = spelling_of(model, weights)
    matrices: dict[int, list[Matrix]] = {}
    for matrix in matrices_of(model, experts):
        matrices.setdefault(id(matrix.weight), []).append(matrix)
    for weight in experts:
        if not _is_whole_by_expert(weight):
            continue
        own = tuple(matrices[id(weight)])
        names = tuple(spelling(f"{matrix.name}.weight") for matrix in own)
        if all(name in weights and tuple(weights.get_slice(name).shape) == weight.shape for name in names):
            yield Places(weight, names, own)
        elif (key := spelling(weight.key)) in weights and weights.get_slice(key).shape == weight.tensor.shape:
            yield Places(weight, (key,), None)


def _is_whole_by_expert(weight: ExpertWeight) -> bool:
    """Whether no matrix of it is cut by how it is sharded."""
    placements = getattr(weight.tensor, "placements", ())
    return all(place.is_replicate() or (weight.stacked and place.is_shard(0)) for place in placements)


def _held(tensor: Any) -> tuple[torch.Tensor, int, int]:
    """What of a parameter this process has, and which of its first dimension that is."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach(), 0, tensor.shape[0]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), offset[0], offset[0] + shape[0]


def _load_rest(
    base: Any, rest: dict[str, Any], places: Iterable[Places], source: str, device: torch.device, layers: float
) -> None:
    """Everything but the experts in `places`, which get their memory; KconvertError unless the names are the model's.

    The source has so many `layers`, without MTP.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    before = {**dict(base.named_parameters()), **dict(base.named_non_persistent_buffers())}
    conversions = getattr(base, "_weight_conversions", None)
    mapping: Any = get_model_conversion_mapping(base)
    options = LoadStateDictConfig(
        device_map=_device_map(base, device),
        weight_mapping=mapping,
        dtype_plan=base._get_dtype_plan(base.dtype),  # what is F32 in a model of any dtype
    )
    with _one_at_a_time():
        found, _ = convert_and_load_state_dict_in_model(base, rest, options, disk_offload_index=None)
    base._weight_conversions = conversions  # the loader leaves those alone that the experts needed
    for failure in (failure for lazy in rest.values() for failure in lazy.failures):
        raise failure
    _check_values(found, base, source)
    for place in places:
        _make_room(place.weight, device)
        found.missing_keys.discard(place.weight.key)
    base._finalize_model_loading(base, options, found)
    _check_names(found, base, source, layers)
    _restore(base, before)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """transformers' loader reads ahead of itself, as much as there is, unless it is told so."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    told = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if told is None:
            del os.environ[name]
        else:
            os.environ[name] = told


def _device_map(base: Any, device: torch.device) -> dict[str, Any]:
    """Where each parameter is or, from the meta device, comes to."""
    if held := getattr(base, "hf_device_map", None):
        return dict(held)
    devices = {name: device if p.is_meta else p.device for name, p in base.named_parameters()}
    return devices if len(set(devices.values())) > 1 else {"": next(iter(devices.values()), device)}


def _make_room(weight: ExpertWeight, device: torch.device) -> None:
    """Memory for a parameter that has none."""
    tensor = weight.tensor
    if tensor.is_meta:
        made = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=tensor.requires_grad)
        setattr(weight.module, weight.parameter, made)
    weight.tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def _check_values(found: Any, base: Any, source: str) -> None:
    """KconvertError where what the checkpoint has does not make a parameter."""
    model = plain_class(base).__name__
    if found.conversion_errors:
        name = min(found.conversion_errors)
        raise KconvertError(f"transformers cannot make {name!r} of a {model} from the tensors in {source}")
    if found.mismatched_keys:
        name, theirs, mine = min(found.mismatched_keys, key=lambda key: str(key[0]))
        raise KconvertError(f"{source} has {name!r} as {list(theirs)}, but the {model} as {list(mine)}")


def _check_names(found: Any, base: Any, source: str, layers: float) -> None:
    """KconvertError unless every parameter got its value, and every value went to one; but for layers behind the last (MTP)."""
    model = plain_class(base).__name__
    last = getattr(base.config.get_text_config(), "num_hidden_layers", math.inf)
    last = max(last, layers) if math.isfinite(layers) else last
    surplus = {name for name in found.unexpected_keys if max(map(int, LAYER.findall(name)), default=-1) < last}
    for names, fault in (
        (found.missing_keys, "lacks {}, which the {} has"),
        (surplus, "has {}, for which the {} has no place"),
    ):
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise KconvertError(f"{source} {fault.format(repr(min(names)) + more, model)}; it is of another model")


def _restore(base: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Parameters that were there stay the objects that optimisers and hooks may know; those made for them give their values."""
    for name, held in before.items():
        path, _, last = name.rpartition(".")
        module = base.get_submodule(path)
        made = getattr(module, last)
        if made is held:
            continue
        if held.is_meta:
            made.requires_grad_(held.requires_grad)
            continue
        if isinstance(held, nn.Parameter):  # and a buffer that no checkpoint has kept its values
            held.copy_(made)
        setattr(module, last, held)
