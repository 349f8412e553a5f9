"""Weights whose bytes only change places: rows as they are, gate and up apart, heads apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import Fate, Format, Part

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Tile


@dataclass(frozen=True, slots=True)
class Rows(Format):
    """The bytes of `format` for a weight of `cols` columns, which nobody looks into: the tile has those of each row, part
    after part. Every part that belongs to rows has a slice for each."""

    format: Format
    cols: int

    @property
    def label(self) -> str:
        return self.format.label

    @property
    def width(self) -> int:
        """Columns of the tile, four bytes each."""
        return -(-sum(part.nbytes for part in self.format.parts(1, self.cols) if part.every) // 4)

    def fate(self, source: Format) -> Fate:
        return "lossless"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return self.format.parts(rows, self.cols)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        for part, place in self._places(parts, tile):
            place[:] = part

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        for part, place in self._places(parts, tile):
            part[:] = place
        return 0

    def _places(self, parts: Sequence[Bytes], tile: Tile) -> Iterator[tuple[Bytes, Bytes]]:
        """The rows of each part, and where they are in the tile."""
        rows, start = len(tile), 0
        content = tile.view("u1").reshape(rows, -1)
        for part, data in zip(self.format.parts(1, self.cols), parts, strict=True):
            if part.every:
                yield data.reshape(rows, -1), content[:, start : start + part.nbytes]
                start += part.nbytes


@dataclass(frozen=True, slots=True)
class Turns(Format):
    """A stack of matrices whose rows take turns in so many tensors, as MLX has gpt-oss's gate and up, each by `format`:
    the first of them has the rows 0, n, 2n … `names` make a tensor's suffix of the one that it has by `format`;
    those that do not are of biases, which are written without columns."""

    format: Format
    stack: int
    names: tuple[str, ...] = ("gate_proj.{}", "up_proj.{}")

    @property
    def label(self) -> str:
        return self.format.label

    def height(self, rows: int) -> int | None:
        return rows // self.stack

    def fate(self, source: Format) -> Fate:
        return self.format.fate(source)

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        turns, found = len(self.names), []
        for name in self.names:
            for part in self.format.parts(rows // turns, cols):
                shape = (self.stack, rows // turns // self.stack, *part.shape[1:])
                if "{}" not in name and isinstance(self.format, Rows):
                    shape = shape[:2]
                found.append(replace(part, suffix=name.format(part.suffix), shape=shape, every=turns))
        return tuple(found)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        for place, own in self._turns(parts):
            rows = np.empty((len(tile) // len(self.names), tile.shape[1]), "f4")
            self.format.decode(own, first_row // len(self.names), rows)
            tile[place :: len(self.names)] = rows

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        return sum(self.format.encode(tile[place :: len(self.names)].copy(), own) for place, own in self._turns(parts))

    def _turns(self, parts: Sequence[Bytes]) -> Iterator[tuple[int, Sequence[Bytes]]]:
        each = len(parts) // len(self.names)
        return ((place, parts[place * each : (place + 1) * each]) for place in range(len(self.names)))


@dataclass(frozen=True, slots=True)
class Heads(Format):
    """kv_b of latent attention, [heads * (nope + v), rank], as two stacks of a matrix a head: embed_q [heads, rank, nope], the
    keys' part transposed, and unembed_out [heads, v, rank]; spelt by `keys` and `values`."""

    nope: int
    v: int
    keys: Format
    values: Format

    @property
    def label(self) -> str:
        return f"{self.values.label} by heads"

    def fate(self, source: Format) -> Fate:
        return self.values.fate(source)

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        height = self.nope + self.v
        heads = rows // height
        if rows % height:
            raise ValueError(f"its {rows} rows are no whole heads of {height}")
        keys = (("embed_q", part) for part in self.keys.parts(heads * cols, self.nope))
        values = (("unembed_out", part) for part in self.values.parts(heads * self.v, cols))
        return tuple(
            replace(
                part,
                suffix=f"{name}.{part.suffix}",
                shape=(heads, part.shape[0] // max(heads, 1), *part.shape[1:]),
                every=height,
            )
            for name, part in (*keys, *values)
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        keys, values = self._halves(tile)
        count = len(self.keys.parts(0, self.nope))
        self.keys.decode(parts[:count], 0, keys)
        self.values.decode(parts[count:], 0, values)
        heads = tile.reshape(-1, self.nope + self.v, tile.shape[1])
        heads[:, : self.nope] = keys.reshape(len(heads), -1, self.nope).swapaxes(1, 2)
        heads[:, self.nope :] = values.reshape(len(heads), self.v, -1)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        keys, values = self._halves(tile)
        count = len(self.keys.parts(0, self.nope))
        heads = tile.reshape(-1, self.nope + self.v, tile.shape[1])
        keys.reshape(len(heads), -1, self.nope)[:] = heads[:, : self.nope].swapaxes(1, 2)
        values.reshape(len(heads), self.v, -1)[:] = heads[:, self.nope :]
        return self.keys.encode(keys, parts[:count]) + self.values.encode(values, parts[count:])

    def _halves(self, tile: Tile) -> tuple[Tile, Tile]:
        """Room for the two matrices that the tile's heads make."""
        import numpy as np

        heads, cols = len(tile) // (self.nope + self.v), tile.shape[1]
        return np.empty((heads * cols, self.nope), "f4"), np.empty((heads * self.v, cols), "f4")
