"""The tensors of a directory that mlx-lm loads, as the weights that the model's own releases have: names and places, no bytes.

`switch_mlp.gate_proj` stacks a matrix of each expert [experts, out, in]; `embed_q` and `unembed_out` are kv_b by heads;
gpt-oss's `experts.gate_proj` and `up_proj` are the rows of gate_up that take turns, see formats.engines.turns.
Source: https://github.com/ml-explore/mlx-lm, `mlx_lm/models` (0.32.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from kconvert.checkpoint.safetensors import Tensor
from kconvert.formats.engines.mlx import HALVES, STACKED
from kconvert.models.stacks import MAX_EXPERTS, Stack, views

if TYPE_CHECKING:
    from kconvert.models.manifest import Names

Modules: TypeAlias = "dict[str, dict[str, Tensor]]"  # weights and their tensors by suffix

KV_B = "kv_b_proj"
SWITCH = re.compile(r"(.+)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.(weight|scales|biases)")
HEADS = re.compile(rf"(.+)\.((?:{'|'.join(HALVES)})\.(?:weight|scales|biases))")
GPT_OSS = re.compile(rf"(.+\.experts)\.({'|'.join(STACKED)})\.(weight|scales|biases)")
WORDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # as some models call an expert's matrices


def is_name(name: str) -> bool:
    """Whether only MLX calls a tensor so: stacks of experts, and kv_b by heads, which a model of dense layers has, too."""
    return (SWITCH.fullmatch(name) or HEADS.fullmatch(name)) is not None


def gather(tensors: Mapping[str, Tensor], names: Names) -> tuple[Mapping[str, Tensor], Modules]:
    """The tensors that are no such stacks, and the weights that lie in those that are."""
    modules: Modules = {}
    taken: set[str] = set()
    for name, tensor in tensors.items():
        if len(tensor.shape) != 3:
            continue
        if match := SWITCH.fullmatch(name):
            if 0 < tensor.shape[0] <= MAX_EXPERTS:
                taken.add(name)
                _cut(tensor, match, names, modules)
        elif match := HEADS.fullmatch(name):
            taken.add(name)
            modules.setdefault(f"{match[1]}.{KV_B}", {})[match[2]] = tensor
        elif (match := GPT_OSS.fullmatch(name)) and names.linear(f"{match[1]}.gate_up_proj") is not None:
            taken.add(name)
            _take_turns(tensors, tensor, match, modules, taken)
    if not taken:
        return tensors, modules
    return {name: tensor for name, tensor in tensors.items() if name not in taken}, modules


def _cut(tensor: Tensor, match: re.Match[str], names: Names, modules: Modules) -> None:
    """A part of each expert's matrix."""
    before, word, suffix = match.groups()
    if names.linear(f"{before}.experts.0.{WORDS[word]}") is not None:
        word = WORDS[word]
    members = tuple(f"{before}.experts.{expert}.{word}" for expert in range(tensor.shape[0]))
    for weight, view in zip(members, views(Stack(tensor.name, members), suffix, tensor), strict=True):
        modules.setdefault(weight, {})[suffix] = view


def _take_turns(
    tensors: Mapping[str, Tensor], tensor: Tensor, match: re.Match[str], modules: Modules, taken: set[str]
) -> None:
    experts, word, suffix = match.groups()
    weight = f"{experts}.{'down_proj' if word == 'down_proj' else 'gate_up_proj'}"
    modules.setdefault(weight, {})[f"{word}.{suffix}"] = tensor
    bias = tensors.get(f"{experts}.{word}.bias")
    if bias is not None and bias.name not in taken:
        taken.add(bias.name)
        modules.setdefault(f"{weight}_bias", {})[f"{word}.bias"] = bias
