"""INT4 and FP8 as compressed-tensors decodes them, by torch in less time: two thirds of it for INT4, a fifth for FP8.

Two bytes of codes are an index into a table of the values that they spell; a piece that fits into a cache is looked up and
multiplied by its scales in memory that the thread keeps. Symmetric INT4: bf16 codes times bf16 scales, as compressed-tensors
has it. FP8: f32 codes times f32 scales, and the products rounded to bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from kconvert.buffers import Buffers
from kconvert.formats.fp8 import Fp8
from kconvert.formats.packed import Packed
from kconvert.model import Weight
from kconvert.parity.oracle import PIECE_ELEMENTS, State, decoded

if TYPE_CHECKING:
    import torch


def is_quick(weight: Weight) -> bool:
    """Whether there is a way to its values besides oracle.decoded."""
    match format := weight.format:
        case Packed():
            usual = (format.bits, format.symmetric, format.ordered, format.scale_dtype) == (4, True, False, "BF16")
            return usual and weight.cols % 8 == 0
        case Fp8():
            return weight.cols % 2 == 0
    return False


def values(weight: Weight, state: State, rows: int, buffers: Buffers) -> torch.Tensor:
    """oracle.decoded of some rows; of a quick weight in memory of `buffers`, lost with the next call."""
    import torch

    shape = rows, weight.cols
    if not is_quick(weight):
        return decoded(weight.format, state, shape)
    out = _take(buffers, "values", torch.bfloat16, shape)
    if isinstance(weight.format, Fp8):
        _decode_fp8(weight.format, state["weight"], state[weight.format.scale_name].float(), out, buffers)
    else:
        _decode_int4(state["weight_packed"], state["weight_scale"], out, buffers)
    return out


def _decode_int4(words: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, buffers: Buffers) -> None:
    import torch

    fours = words.view(torch.uint16).view(len(out), -1)
    groups = scale.view(len(out), -1, 1)
    for rows in _pieces(out.shape, len(out)):
        codes = _look_up(_four_nibbles(), fours[rows], buffers).view(torch.bfloat16)
        target = out[rows].view(-1, groups.shape[1], out.shape[1] // groups.shape[1])
        torch.mul(codes.view(target.shape), groups[rows], out=target)


def _decode_fp8(format: Fp8, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, buffers: Buffers) -> None:
    import torch

    pairs = codes.view(torch.uint16).view(len(out), -1)
    blocks = format.strategy == "block"
    height, width = format.block_shape(*out.shape) if blocks else out.shape
    # For blocks a factor for each column, by row of blocks; else one for each row.
    factors = scale.repeat_interleave(width, 1)[:, : out.shape[1]] if blocks else scale.view(-1, 1).expand(len(out), 1)
    for rows in _pieces(out.shape, height):
        products = _look_up(_two_floats(), pairs[rows], buffers).view(torch.float32).view(-1, out.shape[1])
        out[rows] = products.mul_(factors[rows.start // height if blocks else rows])


def _pieces(shape: torch.Size, height: int) -> Iterator[slice]:
    """The rows in pieces that fit into a cache; none goes over a multiple of `height`."""
    count = max(1, PIECE_ELEMENTS // max(shape[1], 1))
    for top in range(0, shape[0], height):
        bottom = min(top + height, shape[0])
        for first in range(top, bottom, count):
            yield slice(first, min(first + count, bottom))


def _look_up(table: torch.Tensor, codes: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """The entries of `table` that two bytes each of `codes` say, one after the other."""
    import torch

    index = _take(buffers, "index", torch.int32, codes.shape).copy_(codes).view(-1)
    return torch.index_select(table, 0, index, out=_take(buffers, "entries", torch.int64, index.shape))


def _take(buffers: Buffers, use: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    room = buffers.take(use, math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(room).view(dtype).view(shape)


@cache
def _four_nibbles() -> torch.Tensor:
    """int64 [2^16]: the bits of four bf16, by two bytes of INT4 codes."""
    import torch

    pairs = torch.arange(1 << 16)
    codes = torch.stack([(pairs >> shift & 15) - 8 for shift in (0, 4, 8, 12)], 1)
    return codes.bfloat16().view(torch.int64).view(-1)


@cache
def _two_floats() -> torch.Tensor:
    """int64 [2^16]: the bits of two f32, by two bytes of e4m3 codes."""
    import torch

    codes = torch.arange(1 << 16).to(torch.uint16).view(torch.float8_e4m3fn)
    return codes.float().view(torch.int64)
