"""Matrices of several experts in one tensor [experts, rows, cols], seen as a tensor for each: names and places, no bytes.

So a model has one weight for each matrix of an expert, however its release lays them out. Which tensors are stacks a manifest
says (`stacks`), or their names do, as transformers fuses experts: `experts.gate_up_proj` [experts, 2 * out, in] and
`experts.down_proj` without `.weight`, their FP8 scales behind the same names, also those of matrices that lie apart. The
transposed stacks of gpt-oss (see formats.stacks) are told by their shapes and left alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from kconvert.checkpoint.safetensors import Tensor
from kconvert.errors import KconvertError, counted
from kconvert.formats.dense import DTYPES

CODES = (*DTYPES, "F8_E4M3")
MAX_EXPERTS = 1 << 16  # more have no model; a header may claim them
# What follows a stack's name -> the suffix of its matrices.
SUFFIXES = {
    "": "weight",
    ".weight": "weight",
    "_scale_inv": "weight_scale_inv",
    ".weight_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    ".weight_scale": "weight_scale",
    ".scale": "scale",
}
STACKED = frozenset(SUFFIXES.values())
NAMES = re.compile(r"((?:.+\.)?experts)\.(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)", re.DOTALL)
GATE_UP = ("gate_proj", "up_proj")
# What stands on the other side of the activation: its rows are the columns of this, and its columns these rows.
OPPOSITE = {
    **dict.fromkeys(("gate_up_proj", *GATE_UP), ("down_proj",)),
    "down_proj": ("gate_up_proj", *GATE_UP),
    **dict.fromkeys(("w1", "w3"), ("w2",)),
    "w2": ("w1", "w3"),
}


@dataclass(frozen=True, slots=True)
class Stack:
    """`name` is the stack's, `members` the weights in its order: for every expert its `width` matrices, one above the other.

    `bare`: its tensor is called by the name alone; `plain`: it is a stack only where its values are not quantised.
    """

    name: str
    members: tuple[str, ...]
    width: int = 1
    bare: bool = False
    plain: bool = False


def unstack(
    tensors: Mapping[str, Tensor], known: Mapping[str, Stack]
) -> tuple[Mapping[str, Tensor], Mapping[str, Stack]]:
    """The tensors with a view of each matrix in place of the stacks, and the stacks of weights, by name.

    `known` are those of the model's manifest. KconvertError where a stack and its scales do not fit together, or a matrix is
    there twice.
    """
    candidates = _candidates(tensors, known)
    if not candidates:
        return tensors, known
    whole, stacks = dict(tensors), dict(known)
    for name, parts in candidates.items():
        stack = known.get(name) or _named(name, parts, tensors)
        if stack is None:
            continue
        if "weight" in parts:
            stacks[name] = stack
        for suffix, tensor in parts.items():
            del whole[tensor.name]
            for view in views(stack, suffix, tensor):
                if (other := whole.get(view.name)) is not None:
                    where = "a tensor of its own" if view.name in tensors else f"in another stack of {other.file}"
                    raise KconvertError(f"{tensor} has {view.name!r} in it, which is also {where}")
                whole[view.name] = view
    return whole, stacks


def _candidates(tensors: Mapping[str, Tensor], known: Container[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of what may be a stack, by its name and the suffix of its matrices."""
    names: dict[str, None] = {}
    for tensor, facts in tensors.items():
        if len(facts.shape) == 3:
            possible = (tensor.removesuffix(tail) for tail in SUFFIXES if tensor.endswith(tail))
            names |= dict.fromkeys(name for name in possible if name in known or NAMES.fullmatch(name))
    found = {}
    for name in names:
        parts: dict[str, Tensor] = {}
        for tail, suffix in SUFFIXES.items():
            if (part := tensors.get(name + tail)) is None:
                continue
            if suffix in parts:
                raise KconvertError(f"{part} and {parts[suffix].name!r} are two names for the same matrices")
            parts[suffix] = part
        found[name] = parts
    return found


def _named(name: str, parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Stack | None:
    """The stack that is one by its name and shape; None where it is none, or one of another kind."""
    match = NAMES.fullmatch(name)
    assert match is not None
    experts, last = match.groups()
    projections = GATE_UP if last == "gate_up_proj" else (last,)
    first = next(iter(parts.values()))
    count = first.shape[0] if 0 not in first.shape else 0
    if not 0 < count <= MAX_EXPERTS:
        return None
    members = tuple(f"{experts}.{expert}.{word}" for expert in range(count) for word in projections)
    codes = parts.get("weight")
    if codes is None:  # as transformers saves the scales of matrices that lie apart, also of some that it left alone
        is_stack = "weight_scale_inv" in parts and any(f"{member}.weight" in tensors for member in members)
    else:
        is_stack = codes.dtype in CODES and _stands_upright(experts, last, codes, tensors)
    bare = codes is not None and codes.name == name
    return Stack(name, members, len(projections), bare, plain=True) if is_stack else None


def _stands_upright(experts: str, last: str, codes: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Whether its matrices are [out, in]: the shape of the opposite projection's tells."""
    for word in OPPOSITE[last]:
        for tail in ("", ".weight"):
            other = tensors.get(f"{experts}.{word}{tail}")
            if other is not None and len(other.shape) == len(codes.shape) == 3:
                # Of gate and up together the rows are twice the columns of down.
                mine, theirs = (2 if name == "gate_up_proj" else 1 for name in (last, word))
                return codes.shape[1:] == (other.shape[2] * mine, other.shape[1] // theirs)
    return False


class Matrix(Tensor):
    """What of a tensor called `stack` is one matrix's, called as it would be by itself."""

    stack: str

    @classmethod
    def of(cls, tensor: Tensor, name: str, shape: tuple[int, ...], start: int, nbytes: int) -> Matrix:
        matrix = cls(name, tensor.dtype, shape, tensor.file, start, nbytes)
        matrix.stack = tensor.name
        return matrix

    @property
    def title(self) -> str:
        return f"part {self.name!r} of tensor {self.stack!r}"


def views(stack: Stack, suffix: str, tensor: Tensor) -> Iterator[Tensor]:
    """The part of each matrix as a tensor; one number for an expert is one for each of its matrices."""
    experts = len(stack.members) // stack.width
    count, *rest = tensor.shape or (1,)
    if suffix == "weight" and len(rest) != 2:
        raise KconvertError(f"{tensor} is {tensor.dtype} {list(tensor.shape)}, which is no stack of matrices")
    if count != experts:
        held = f"is a stack of {counted(count, 'matrix', 'matrices')}"
        raise KconvertError(f"{tensor} {held}, but there are {experts} experts")
    shape: tuple[int, ...] = (1,)
    shared = 1
    if math.prod(rest) == 1 and suffix != "weight":
        shared = stack.width
    elif rest[0] % stack.width:
        raise KconvertError(
            f"{tensor} has {rest[0]} rows for each expert, which do not divide into those of its {stack.width} matrices"
        )
    else:
        shape = (rest[0] // stack.width, *rest[1:])
    nbytes = tensor.nbytes * shared // len(stack.members)
    for number, member in enumerate(stack.members):
        start = tensor.start + number // shared * nbytes
        yield Matrix.of(tensor, f"{member}.{suffix}", shape, start, nbytes)
