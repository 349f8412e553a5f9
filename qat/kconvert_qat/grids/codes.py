"""A weight as the format of its grid spells it: pieces that are encoded and decoded as an export and its reader do it.

A piece is some rows of one matrix, which begin where a block does. One with a value that is not finite has no codes: its groups
with such values are NaN, and it is held as bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from kconvert.formats.base import Format
from kconvert.formats.dense import Dense
from kconvert_qat.grids.memory import array_of, in_threads, room

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kconvert.formats.base import Bytes, Tile

VALUES = 1 << 16  # of a piece, if a block has not more
BF16 = Dense("BF16")
Spelt: TypeAlias = "tuple[Format, list[Bytes]]"


@dataclass(frozen=True)
class Blocks:
    """How a format's codes lie: it has a scale for each block of so many rows and columns."""

    format: Format
    rows: int
    cols: int


@dataclass(frozen=True)
class Codes:
    """A weight of this shape and dtype, contiguous, in pieces."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: dict[tuple[int, int, int], Spelt]
    _version: int = 0  # nobody can write into it

    def values(self) -> torch.Tensor:
        served = room(self.shape, self.dtype)
        matrices = matrices_of(served)
        in_threads(lambda piece: _decode(self.pieces[piece], rows_of(matrices, piece)), self.pieces)
        return served


def encode(weight: torch.Tensor, blocks: Blocks, reaches: Sequence[float]) -> Codes:
    """The codes of a weight [..., rows, cols]; `reaches` are for each matrix, see Format.settle."""
    weight = weight.detach().contiguous()  # by this name it stays in memory
    matrices = matrices_of(weight)
    pieces: dict[tuple[int, int, int], Spelt] = {}

    def work(piece: tuple[int, int, int]) -> None:
        pieces[piece] = _encode(rows_of(matrices, piece), blocks, reaches[piece[0]])

    in_threads(work, pieces_of(matrices.shape, blocks.rows, VALUES))
    return Codes(weight.shape, weight.dtype, pieces)


def matrices_of(tensor: torch.Tensor) -> NDArray[Any]:
    """[..., rows, cols] or [cols], contiguous -> [matrices, rows, cols], the same memory."""
    array = array_of(tensor)
    return array.reshape(-1, *([1] * (2 - array.ndim)), *array.shape[-2:])


def pieces_of(shape: tuple[int, ...], multiple: int, values: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, first row, row after the last); each of at most so many values, if so many rows have not more."""
    matrices, rows, cols = shape
    step = max(1, values // (multiple * max(cols, 1))) * multiple
    for matrix in range(matrices):
        for first in range(0, rows, step):
            yield matrix, first, min(first + step, rows)


def rows_of(matrices: NDArray[Any], piece: tuple[int, int, int]) -> NDArray[Any]:
    return matrices[piece[0], piece[1] : piece[2]]


def _encode(rows: NDArray[Any], blocks: Blocks, reach: float) -> Spelt:
    tile, are_finite = _tile_of(rows)
    if not are_finite:
        return _with_nan(tile, blocks, reach)
    format = blocks.format
    parts = [np.zeros(part.nbytes, np.uint8) for part in format.parts(*tile.shape)]
    if format.settles(BF16):
        format.settle(reach, parts)
    format.encode(tile, parts)
    return format, parts


def _with_nan(tile: Tile, blocks: Blocks, reach: float) -> Spelt:
    """bf16 values, NaN in blocks with a value that is not finite."""
    lost = ~np.isfinite(tile)
    rows, cols = tile.shape
    for first in range(0, rows, blocks.rows):
        for left in range(0, cols, blocks.cols):
            block = np.s_[first : first + blocks.rows, left : left + blocks.cols]
            lost[block] = lost[block].any()
    bits = np.empty(tile.shape, "u2")
    _decode(_encode(np.where(lost, np.float32(0), tile), blocks, reach), bits)
    bits[lost] = 0x7FC0
    return BF16, [bits.reshape(-1).view(np.uint8)]


def _tile_of(rows: NDArray[Any]) -> tuple[Tile, bool]:
    """Values rounded to bf16 as f32 [rows, cols], and whether all are finite."""
    tile = np.empty(rows.shape, np.float32)
    bits = rows
    if rows.dtype == np.float32:
        if not (finite := np.isfinite(rows)).all():
            return np.where(finite, rows, np.float32(np.nan)), False
        bits = np.empty(rows.shape, "u2")
        BF16.encode(rows, [bits.reshape(-1).view(np.uint8)])
    BF16.decode([np.ascontiguousarray(bits).reshape(-1).view(np.uint8)], 0, tile)
    return tile, not (bits & 0x7FFF >= 0x7F80).any()


def _decode(spelt: Spelt, rows: NDArray[Any]) -> None:
    """The values into contiguous rows of bf16 or f32."""
    format, parts = spelt
    if format is BF16 and rows.dtype != np.float32:
        rows[:] = parts[0].view("u2").reshape(rows.shape)
        return
    tile = rows if rows.dtype == np.float32 else np.empty(rows.shape, np.float32)
    format.decode(parts, 0, tile)
    if tile is not rows:
        BF16.encode(tile, [rows.reshape(-1).view(np.uint8)])
