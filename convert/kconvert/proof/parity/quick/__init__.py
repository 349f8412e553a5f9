"""The independent way in less time: what `oracle` says, by torch in kept memory, in pieces that fit into a cache.

Whoever uses it asks the oracle as well: for the values of the first rows of each source weight and of the first output of a
kind, for the bytes of the first chunk of a kind, and for both wherever something seems to be wrong.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats import Format
from kconvert.formats.amx import Amx
from kconvert.formats.fp8 import Fp8
from kconvert.formats.packed import Packed
from kconvert.models.model import Weight
from kconvert.proof.parity.oracle import State, amx_parts, decoded, fp8_scale, has_reference
from kconvert.proof.parity.quick import amx, fp8, int4

if TYPE_CHECKING:
    import torch


def is_quick(weight: Weight) -> bool:
    """Whether there is a way to its values besides oracle.decoded."""
    match format := weight.format:
        case Packed():
            return has_reference(format) and weight.cols % 8 == 0
        case Fp8():
            return weight.cols % 2 == 0
    return False


def values(weight: Weight, state: State, rows: int, buffers: Buffers) -> torch.Tensor:
    """oracle.decoded of some rows; of a quick weight in memory of `buffers`, lost with the next call."""
    if is_quick(weight):
        match format := weight.format:
            case Packed():
                return int4.decode(state["weight_packed"], state["weight_scale"], weight.cols, buffers)
            case Fp8():
                block = format.block if format.strategy == "block" else None
                return fp8.decode(state["weight"], fp8_scale(format, state), block, buffers)
    return decoded(weight.format, state, (rows, weight.cols))


def encodes(format: Format) -> bool:
    """Whether there is a way to its bytes besides oracle.expected_parts."""
    match format:
        case Fp8():
            return has_reference(format)
        case Amx():
            return format.mse is not None
    return False


def parts(values: torch.Tensor, weight: Weight, first: int, buffers: Buffers) -> State | None:
    """What the format of `weight`, one that this module encodes, makes of [rows, cols] as its rows from `first` on: FP8 by
    its usual rule, AMX by what is known of its scales; in memory of `buffers`. None where only the reference knows."""
    import torch

    if values.dtype != torch.bfloat16 or not values.is_contiguous():
        return None
    match format := weight.format:
        case Fp8():
            block = format.block if format.strategy == "block" else None
            if block is None or not (values.shape[0] % block[0] or values.shape[1] % block[1]):
                dtype = torch.bfloat16 if format.scale_dtype == "BF16" else torch.float32
                codes, scale = fp8.encode(values, block, dtype, buffers)
                return {"weight": codes, format.scale_name: scale}
        case Amx():
            quantise = partial(amx.codes_and_scale, bits=format.bits, mse=bool(format.mse), buffers=buffers)
            return amx_parts(values, weight, first, format, quantise)
    return None
