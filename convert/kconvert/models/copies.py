"""Which tensors may be copied as they are: a name does not earn that, only a dtype and what stands beside a tensor.

A copy of codes whose scale is copied beside them, into a checkpoint whose config.json says nothing of them, is read as values
by every engine. So whatever may be codes, or a part of a weight that no rule decodes, is told apart here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from kconvert.checkpoint.safetensors import Tensor
from kconvert.models.sorting import Plain

# Dtypes in which models have values; codes and packed words come in none of them.
VALUE_DTYPES = frozenset({"BF16", "F16", "F32", "F64", "BOOL", "I64", "U64", "C64"})
INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
# Last words of the names of tensors that are integers by nature: hash tables, positions, masks.
INTEGER_TABLES = frozenset({"tid2eid", "position_ids", "relative_position_index", "token_type_ids", "d2t", "t2d"})
MASKS = (".masked_bias", ".attn.bias", ".attention_mask", ".causal_mask")
# Names of what belongs to an encoded weight and to nothing else.
PARTS = re.compile(
    r"(_scale_inv|_packed|[._](qweight|qzeros|g_idx|SCB|absmax|quant_map)|quant_state\..+"
    r"|(^|[._])weight_(scale|scale_2|zero_point|global_scale|shape|g_idx|blocks|scales)|scale_weight)$"
)
SCALES = re.compile(r"[._](scale|zero|absmax|SCB)[^.]*$")
# What makes the name of the scale (and its like) of a tensor: behind its whole name, or in place of its last word.
BEHIND = ("_scale", "_scale_inv", "_scales", "_zeros", "_zero_point", "_packed", "_blocks", "_qweight", "_scale_2")
BESIDE = ("scale", "scales", "scale_inv", "zeros", "qzeros", "zero_point", "qweight", "scale_weight", "SCB", "absmax")


def is_code_dtype(tensor: Tensor) -> bool:
    """Whether no model has values in this dtype (integers: as a matrix, outside the known tables of integers)."""
    if tensor.dtype in VALUE_DTYPES:
        return False
    if tensor.dtype not in INTEGERS:
        return True
    known = tensor.name.rpartition(".")[2] in INTEGER_TABLES or f".{tensor.name}".endswith(MASKS)
    return len(tensor.shape) > 1 and not known


def undecoded(tensors: Iterable[Plain]) -> list[tuple[Tensor, str]]:
    """Every one of a checkpoint's plain tensors that must not be copied, and why, in a few words; the codes come first."""
    tensors = tuple(tensors)
    names = {plain.tensor.name for plain in tensors}
    found = [(plain.tensor, reason) for plain in tensors if (reason := _reason(plain, names))]
    return sorted(found, key=lambda pair: _rank(pair[0]))


def _rank(tensor: Tensor) -> tuple[bool, bool]:
    return SCALES.search(tensor.name) is not None, not is_code_dtype(tensor)


def _reason(plain: Plain, names: Collection[str]) -> str | None:
    tensor = plain.tensor
    if is_code_dtype(tensor):
        beside = sibling(tensor, names)
        return f"is {tensor.dtype} {list(tensor.shape)}{f' with {beside!r} beside it' if beside else ''}"
    if plain.listed:
        return None
    if PARTS.search(tensor.name):
        return "is called like a part of a quantised weight"
    if (len(tensor.shape) > 1 or tensor.dtype in INTEGERS) and (beside := sibling(tensor, names)):
        return f"has {beside!r} beside it"
    return None


def sibling(tensor: Tensor, names: Collection[str]) -> str | None:
    """The name of a tensor that says by its own that this one is quantised."""
    stem, dot, last = tensor.name.rpartition(".")
    candidates = [tensor.name + suffix for suffix in BEHIND]
    if last in ("weight", "qweight"):
        candidates += [f"{stem}{dot}{word}" for word in BESIDE]
    return next((name for name in candidates if name in names), None)
