"""Every tensor of a checkpoint is a part of a weight, plain, or left behind: by the names of a manifest, or without them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from sys import intern
from typing import NamedTuple

from kconvert import formats
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import KconvertError
from kconvert.formats.base import CACHE, COMPANIONS
from kconvert.formats.dense import DTYPES
from kconvert.models.manifest import Names
from kconvert.models.mlx import gather
from kconvert.models.roles import guess
from kconvert.models.stacks import Stack, unstack

# What engines compute by themselves and old checkpoints carry.
ROTARY = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
BUFFERS = (*ROTARY, ".masked_bias", ".attn.bias")
# What training code wraps modules in, as it appears in the names of their tensors.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_checkpoint_wrapped_module.": "gradient checkpointing",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "a trainer",
    "base_model.model.": "PEFT",
    ".base_layer.": "PEFT",
    ".lora_A.": "PEFT",
}
WRAPPED = re.compile("|".join(map(re.escape, WRAPPERS)))
DATA_PARALLEL = "module."


class Plain(NamedTuple):
    """A tensor that is no Linear: it is copied as it is. `listed`: the manifest knows its name and shape; `below`: and that its
    integers lie in [0, below)."""

    tensor: Tensor
    role: str
    layer: int | None = None
    listed: bool = False
    below: int | None = None


@dataclass(frozen=True)
class Sorted:
    """`modules` maps weights to their tensors by suffix; `unlisted` are tensors that the manifest does not know, `stacks` those
    in which matrices of experts lie, or may be written; see models.stacks."""

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    plain: dict[str, Plain] = field(default_factory=dict)
    dropped: list[Tensor] = field(default_factory=list)
    unlisted: list[Tensor] = field(default_factory=list)
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        """Whether there is a weight or a tensor that a manifest calls so, be the tensor quantised and so a weight."""
        return name in self.modules or name in self.plain or str(name).removesuffix(".weight") in self.modules


def sort_out(checkpoint: Checkpoint, names: Names) -> Sorted:
    """Sort the checkpoint's tensors; KconvertError when one has not the shape that the manifest gives it, or is wrapped."""
    tensors, modules = gather(checkpoint.tensors, names)
    tensors, stacks = unstack(tensors, names.stacks)
    sorted_ = Sorted(modules, stacks=stacks)
    last, is_matrix = "", names.is_matrix("")
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if module != last:  # the tensors of a weight mostly follow one another
            last, is_matrix = module, names.is_matrix(module)
        match = names.tensor(name)
        if match is not None and (tensor.dtype == match.rule.dtype or tensor.dtype in DTYPES):
            if tensor.shape != match.shape:
                raise KconvertError(f"{tensor} has the shape {list(tensor.shape)}, the model's is {list(match.shape)}")
            sorted_.plain[name] = Plain(tensor, match.rule.role, match.layer, True, names.below(name))
        elif suffix in CACHE:
            # They describe activations, not weights, and lose their meaning with the quantisation.
            sorted_.dropped.append(tensor)
        elif is_matrix and _is_part(suffix):
            sorted_.modules.setdefault(module, {})[intern(suffix)] = tensor
        elif (spelling := names.in_stack(name)) is not None and _is_part(spelling[1]):
            stack, suffix = spelling
            sorted_.modules.setdefault(stack, {})[suffix] = tensor
        elif f".{name}".endswith(BUFFERS):
            sorted_.plain[name] = Plain(tensor, "buffer")
        else:
            sorted_.unlisted.append(tensor)
    _check_wrappers(sorted_.unlisted, len(tensors))
    _sort_out_unlisted(sorted_, names)
    return sorted_


def _is_part(suffix: str) -> bool:
    """Whether a Linear's tensor of this suffix spells its weight, or would: its bias does not."""
    return suffix in formats.SUFFIXES or suffix.startswith("weight")


def _check_wrappers(unlisted: list[Tensor], count: int) -> None:
    """KconvertError when names are those of wrapped modules, which no engine knows."""
    for tensor in unlisted:
        if wrapped := WRAPPED.search(tensor.name):
            raise _wrapped(tensor, wrapped[0].strip("."), WRAPPERS[wrapped[0]])
    if count == len(unlisted) and all(tensor.name.startswith(DATA_PARALLEL) for tensor in unlisted) and unlisted:
        raise _wrapped(unlisted[0], DATA_PARALLEL.strip("."), "DataParallel")


def _wrapped(tensor: Tensor, prefix: str, wrapper: str) -> KconvertError:
    return KconvertError(
        f"{tensor} is called as in a model that {wrapper} has wrapped ({prefix!r} in its name); save the model inside the "
        "wrapper, or rename the tensors"
    )


def _sort_out_unlisted(sorted_: Sorted, names: Names) -> None:
    """Without names to go by, a weight is what has a tensor that only encoded weights have, or an expert's matrix."""
    encoded = _encoded(sorted_.unlisted)
    for tensor in sorted_.unlisted:
        module, _, suffix = tensor.name.rpartition(".")
        is_part = _is_part(suffix) and (module in encoded or module in sorted_.modules)
        if is_part or _is_experts_matrix(tensor, module, suffix):
            sorted_.modules.setdefault(module, {})[intern(suffix)] = tensor
        elif suffix in COMPANIONS and _is_number(tensor):
            sorted_.dropped.append(tensor)
        else:
            role = names.manifest.plain_role(tensor.name) or "other"
            sorted_.plain[tensor.name] = Plain(tensor, role, below=names.below(tensor.name))
    for module in encoded:
        # What a manifest takes for plain may be quantised all the same: an embedding, a router.
        if (whole := sorted_.plain.pop(f"{module}.weight", None)) is not None:
            sorted_.modules[module]["weight"] = whole.tensor


def _encoded(tensors: Iterable[Tensor]) -> set[str]:
    """The weights among these tensors of which one is an encoded weight's and nothing else's, or may be, beside codes."""
    encoded: set[str] = set()
    doubtful: set[str] = set()
    codes: set[str] = set()
    for tensor in tensors:
        module, _, suffix = tensor.name.rpartition(".")
        if suffix in formats.TELLING_SUFFIXES:
            encoded.add(module)
        elif suffix in formats.QUANTISED_SUFFIXES:
            doubtful.add(module)
        if suffix == "weight" and tensor.dtype not in DTYPES:
            codes.add(module)
    return encoded | (doubtful & codes)


def _is_number(tensor: Tensor) -> bool:
    return math.prod(tensor.shape) == 1


def _is_experts_matrix(tensor: Tensor, module: str, suffix: str) -> bool:
    return suffix == "weight" and len(tensor.shape) == 2 and tensor.dtype in DTYPES and guess(module).is_expert


def shows_experts(modules: Iterable[str]) -> bool:
    """Whether the names of these weights tell routed experts from the rest."""
    return any(".experts." in f".{module}." for module in modules)
