"""The routed experts of a model: which parameters hold their matrices, and how these lie in them.

| form | parameters |
|---|---|
| transformers' fused experts | `gate_up_proj` [experts, 2I, H] or `up_proj` [experts, I, H], and `down_proj` [experts, H, I] |
| the same, transposed (gpt-oss) | [experts, H, 2I], gate and up interleaved, and [experts, I, H] |
| a ModuleList called `experts` | of each expert, an nn.Linear for each matrix |

transformers marks its fused classes with `is_transposed`, `is_concatenated`, `has_gate` and `has_bias`; these are read, and
nothing is guessed from shapes. Weights are read with getattr, so that a parametrisation (LoRA) is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from kconvert.errors import KconvertError

MARKS = ("is_transposed", "is_concatenated", "has_gate", "has_bias")
# Names of an expert's Linears, and what transformers' decoders and Mixtral call them.
PIECES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True)
class ExpertWeight:
    """A parameter of `module` that holds matrices [out, in] of routed experts.

    `path` is the module's name in the model, without the names that PEFT's wrappers add. `pieces` are the matrices of one
    expert in it, by their role; `stacked` it has all experts, otherwise it is one matrix.
    """

    path: str
    module: nn.Module
    parameter: str
    pieces: tuple[str, ...]
    stacked: bool = True
    transposed: bool = False
    concatenated: bool = True

    @property
    def key(self) -> str:
        """The parameter's name in the model's state dict."""
        return f"{self.path}.{self.parameter}"

    @property
    def tensor(self) -> torch.Tensor:
        value: torch.Tensor = getattr(self.module, self.parameter)
        return value

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of each matrix."""
        size = self.tensor.shape
        rows, cols = (size[-1], size[-2]) if self.transposed else (size[-2], size[-1])
        return rows // len(self.pieces), cols

    def matrix(self, tensor: torch.Tensor, expert: int, piece: str) -> torch.Tensor:
        """One matrix [out, in] of `tensor`, which is laid out as the parameter is; a view."""
        matrix = tensor[expert] if self.stacked else tensor
        matrix = matrix.mT if self.transposed else matrix
        count, k = len(self.pieces), self.pieces.index(piece)
        size = matrix.shape[0] // count
        return matrix[k * size : (k + 1) * size] if self.concatenated else matrix[k::count]


def find_experts(model: nn.Module) -> list[ExpertWeight]:
    """Every parameter with routed experts; KconvertError when there is none, or one in a form that is not known."""
    found: list[ExpertWeight] = []
    for name, module in model.named_modules():
        if all(hasattr(module, mark) for mark in MARKS):
            found += _fused(plain_name(name), module)
        elif isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
            if any(expert is None for expert in module):
                raise KconvertError(
                    f"{plain_name(name)} has None for experts that other ranks hold, so that nobody can export them all; let "
                    "every rank have them as DTensors, as transformers' DistributedConfig and FSDP2 do"
                )
            for number, expert in enumerate(module):
                found += _linears(f"{plain_name(name)}.{number}", expert)
    _check_nothing_is_left(model, found)
    if not found:
        raise KconvertError(
            f"{type(model).__name__} has no routed experts that are known; they are transformers' fused experts, or a "
            "ModuleList called experts"
        )
    return found


def plain_name(name: str) -> str:
    """A module's name without what PEFT's wrappers and torch.compile add to it."""
    parts = (part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))
    return ".".join(parts).removeprefix("base_model.model.")


def _fused(path: str, module: nn.Module) -> list[ExpertWeight]:
    first, pieces = ("gate_up_proj", ("gate", "up")) if module.has_gate else ("up_proj", ("up",))
    transposed, concatenated = bool(module.is_transposed), bool(module.is_concatenated)
    for parameter in (first, "down_proj"):
        if not isinstance(getattr(module, parameter, None), torch.Tensor):
            raise KconvertError(f"{path} is marked as fused experts, but has no parameter {parameter!r}")
    return [
        ExpertWeight(path, module, first, pieces, transposed=transposed, concatenated=concatenated),
        ExpertWeight(path, module, "down_proj", ("down",), transposed=transposed, concatenated=True),
    ]


def _linears(path: str, expert: nn.Module) -> Iterator[ExpertWeight]:
    for name, child in expert.named_children():
        linear = getattr(child, "base_layer", child)
        if not isinstance(linear, nn.Linear):
            continue
        if name not in PIECES:
            raise KconvertError(f"{path}.{name} is a Linear of an expert, but not one of {', '.join(PIECES)}")
        yield ExpertWeight(f"{path}.{name}", linear, "weight", (PIECES[name],), stacked=False)


def _check_nothing_is_left(model: nn.Module, found: list[ExpertWeight]) -> None:
    """A stack of matrices in a module that calls itself experts and is none of those found would silently stay as it is."""
    known = {id(weight.module) for weight in found}
    for name, module in model.named_modules():
        if id(module) in known or "expert" not in f"{name} {type(module).__name__}".lower() or "lora_" in name:
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if value.dim() == 3:
                raise KconvertError(
                    f"{name}.{parameter} {list(value.shape)} looks like experts, but {type(module).__name__} does not say how "
                    f"they lie in it ({', '.join(MARKS)})"
                )
