"""A weight's values by somebody else's code: compressed-tensors and torch, never the kernels that convert.

What each encoding needs for that is in `witnesses`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Reader
from kconvert.formats import Format, Part
from kconvert.models.model import Weight
from kconvert.proof.parity.witnesses.registry import witness_of

if TYPE_CHECKING:
    import torch

    from kconvert.proof.parity.witnesses.base import State

# How torch reads the tensors of a file: names, as torch is loaded when it is needed.
TORCH_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U32": "uint32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E8M0": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}


def independent_values(weight: Weight, reader: Reader, first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` (exclusive) of `weight`, [last - first, cols] in the weight's own dtype."""
    unit = row_unit(weight)
    start, stop = first // unit * unit, min(-(-last // unit) * unit, weight.rows)
    state = read_state(weight, reader, start, stop)
    return decoded(weight.format, state, (stop - start, weight.cols))[first - start : last - start]


def read_state(
    weight: Weight, reader: Reader, first: int, last: int, buffers: Buffers | None = None, whole: Buffers | None = None
) -> State:
    """The tensors that these rows of `weight` need, but for constants; `first` is a multiple of row_unit(weight).

    They lie in `buffers`, new ones by default, until something else is read into these. What lies across is read as a whole,
    which stays in `whole`, by default the same, for the next rows.
    """
    buffers = buffers or Buffers()
    return {
        part.suffix: _rows(weight, index, reader, first, last, (whole or buffers) if part.across else buffers)
        for index, part in enumerate(weight.parts)
        if part.constant is None
    }


def decoded(format: Format, state: State, shape: tuple[int, int]) -> torch.Tensor:
    """The values [rows, cols] = `shape` that the tensors `state` spell, in the weight's own dtype."""
    return witness_of(format).values(state, shape)


def is_quick(weight: Weight) -> bool:
    """Whether there is a way to its values besides `decoded`."""
    return witness_of(weight.format).is_quick(weight.cols)


def quick_values(weight: Weight, state: State, rows: int, buffers: Buffers) -> torch.Tensor:
    """`decoded` of some rows; of a quick weight in memory of `buffers`, lost with the next call."""
    if is_quick(weight):
        return witness_of(weight.format).quick_values(state, weight.cols, buffers)
    return decoded(weight.format, state, (rows, weight.cols))


def row_unit(weight: Weight) -> int:
    """Ranges of rows that begin at multiples of this can be decoded and encoded by themselves."""
    return math.lcm(*(part.every for part in weight.parts if part.every))


def _rows(weight: Weight, index: int, reader: Reader, first: int, last: int, buffers: Buffers) -> torch.Tensor:
    """The rows of one part that these rows of the weight need, as torch reads them."""
    import torch

    part, tensor = weight.parts[index], weight.tensors[index]
    if part.dtype not in TORCH_DTYPES:
        raise NotImplementedError(f"torch has no {part.dtype}")
    if part.across:
        return _columns(weight, part, tensor, reader, first, last, buffers)
    start, stop = part.span(weight.rows, first, last)
    data = buffers.fetch(reader, part.suffix, tensor.file, tensor.start + start, stop - start)
    shape = part.shape if part.every is None else (-1, *part.shape[max(1, len(part.shape) - 1) :])
    dtype = getattr(torch, TORCH_DTYPES[part.dtype])
    # A part that belongs to other rows gives none, which torch does not take.
    if not len(data):
        return torch.empty(0, dtype=dtype)
    aligned = (tensor.start + start) % dtype.itemsize == 0
    return torch.from_numpy(data if aligned else data.copy()).view(dtype).view(shape)


def _columns(
    weight: Weight, part: Part, tensor: Tensor, reader: Reader, first: int, last: int, buffers: Buffers
) -> torch.Tensor:
    """_rows of a part that lies across."""
    import torch

    dtype = getattr(torch, TORCH_DTYPES[part.dtype])
    start, stop = (place * dtype.itemsize for place in part.columns(weight.rows, first, last))
    data = buffers.hold(reader, f"across.{part.suffix}", tensor.file, tensor.start, part.nbytes)
    lines = data.reshape(part.shape[0], part.shape[1] * dtype.itemsize)[:, start:stop].copy()
    return torch.from_numpy(lines).view(dtype)
