"""The rows of one weight dealt to several stacks, a matrix of each for every head: kv_b as engines of latent attention want it.

kv_b is [heads * (nope + value), rank], of each head first the rows that make keys, then those that make values. Engines that
absorb it have two stacks, for which the keys are transposed:

| | shape |
|---|---|
| k_b | [heads, rank, nope] |
| v_b | [heads, value, rank] |

Sources: https://github.com/ggml-org/llama.cpp, `conversion/deepseek.py`; https://github.com/ml-explore/mlx-lm,
`models/deepseek_v3.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import FATES, Fate, Format, Part, check_form, tensor_name
from kconvert.formats.dense import Dense

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Tile


@dataclass(frozen=True, slots=True)
class Piece:
    """Of every head `rows` rows, `transposed` or not, as one matrix of a stack in `format`.

    `name` is the suffix under which the stack has a weight's tensors: `_k_b` makes `attn_k_b.weight` of the weight `attn`,
    `embed_q` makes `attn.embed_q.weight`.
    """

    name: str
    rows: int
    format: Format
    transposed: bool = False

    def matrix(self, cols: int) -> tuple[int, int]:
        """The shape of its matrices, of a weight with so many columns."""
        return (cols, self.rows) if self.transposed else (self.rows, cols)


@dataclass(frozen=True, slots=True)
class Heads(Format):
    """A weight has for each head the rows of all `pieces`, one below the other."""

    pieces: tuple[Piece, ...]

    @property
    def height_of_head(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def label(self) -> str:
        labels = dict.fromkeys(piece.format.label for piece in self.pieces)
        return f"{', '.join(labels)} by head"

    @property
    def quantised(self) -> bool:
        return any(piece.format.quantised for piece in self.pieces)

    def fate(self, source: Format) -> Fate:
        """The worst of its pieces'."""
        return max((piece.format.fate(source) for piece in self.pieces), key=FATES.index)

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        check_form(source, rows)
        if source.matrices is not None or rows % self.height_of_head:
            raise ValueError(f"has {rows} rows, which are no whole heads of {self.height_of_head}")
        fitted = (piece.format.fit(source, *piece.matrix(cols), mse=mse) for piece in self.pieces)
        return Heads(tuple(replace(piece, format=format) for piece, format in zip(self.pieces, fitted, strict=True)))

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """Of each piece its format's, stacked."""
        if rows % self.height_of_head:
            raise ValueError(f"its {rows} rows are no whole heads of {self.height_of_head}")
        heads, parts = rows // self.height_of_head, []
        for piece in self.pieces:
            for part in piece.format.parts(*piece.matrix(cols)):
                if part.every is None:
                    raise ValueError(f"its {part.suffix} cannot be stacked")
                name = tensor_name(piece.name, part.suffix)
                parts.append(Part(name, part.dtype, (heads, *part.shape), every=self.height_of_head))
        return tuple(parts)

    def takes_codes(self, source: Format) -> bool:
        """Plain numbers that stay what they are are moved."""
        return isinstance(source, Dense) and all(piece.format == source == Dense(source.dtype) for piece in self.pieces)

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        number = f"u{inputs[0].nbytes // max(rows * cols, 1) or 1}"
        heads = inputs[0].view(number).reshape(-1, self.height_of_head, cols)
        first = 0
        for piece, part in zip(self.pieces, parts, strict=True):
            matrices, first = heads[:, first : first + piece.rows], first + piece.rows
            stack = part.view(number).reshape(len(heads), *piece.matrix(cols))
            stack[:] = matrices.swapaxes(1, 2) if piece.transposed else matrices
        return 0

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        """One head at a time, as `encode`."""
        import numpy as np

        heads = tile.reshape(-1, self.height_of_head, tile.shape[1])
        first = done = 0
        for piece in self.pieces:
            rows, first = heads[:, first : first + piece.rows], first + piece.rows
            shape = piece.matrix(tile.shape[1])
            count = len(piece.format.parts(*shape))
            stacks, done = [part.reshape(len(heads), -1) for part in parts[done : done + count]], done + count
            matrix = np.empty(shape, "f4")
            for number, head in enumerate(rows):
                piece.format.decode([stack[number] for stack in stacks], 0, matrix)
                head[:] = matrix.T if piece.transposed else matrix

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        """One head at a time, so that what is allocated is a matrix of one."""
        import numpy as np

        heads = tile.reshape(-1, self.height_of_head, tile.shape[1])
        lost = first = done = 0
        for piece in self.pieces:
            rows, first = heads[:, first : first + piece.rows], first + piece.rows
            count = len(piece.format.parts(*piece.matrix(tile.shape[1])))
            stacks, done = [part.reshape(len(heads), -1) for part in parts[done : done + count]], done + count
            for number, head in enumerate(rows):
                matrix = np.ascontiguousarray(head.T if piece.transposed else head)
                lost += piece.format.encode(matrix, [stack[number] for stack in stacks])
        return lost
