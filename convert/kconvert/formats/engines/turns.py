"""Stacks whose rows take turns in several tensors: gpt-oss's gate and up as MLX and llama.cpp have them, each in a stack.

| tensor | of the stack [experts, n * out, in] |
|---|---|
| gate | [experts, out, in], the rows 0, n, 2n … of each matrix |
| up | [experts, out, in], the rows 1, n + 1, 2n + 1 … |

Sources: https://github.com/ml-explore/mlx-lm, `models/gpt_oss.py`; https://github.com/ggml-org/llama.cpp,
`conversion/gpt_oss.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import Fate, Format, Part
from kconvert.formats.mx import Mx
from kconvert.formats.stacks import MxStack

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Tile


@dataclass(frozen=True, slots=True)
class Turns(Format):
    """`names` make of a suffix in `format` that of each tensor; of biases, which are `flat`, a column has no dimension."""

    format: Format
    stack: int
    names: tuple[str, ...] = ("gate_proj.{}", "up_proj.{}")
    flat: bool = False

    @property
    def label(self) -> str:
        return self.format.label

    @property
    def quantised(self) -> bool:
        return self.format.quantised

    def height(self, rows: int) -> int | None:
        return rows // self.stack

    def fate(self, source: Format) -> Fate:
        return "lossless" if self.takes_codes(source) else self.format.fate(source)

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        turns, found = len(self.names), []
        for name in self.names:
            for part in self.format.parts(rows // turns, cols):
                width = () if self.flat else part.shape[1:]
                shape = (self.stack, rows // turns // self.stack, *width)
                found.append(replace(part, suffix=name.format(part.suffix), shape=shape, every=turns))
        return tuple(found)

    def takes_codes(self, source: Format) -> bool:
        return self.format.takes_codes(source) or (isinstance(source, MxStack) and isinstance(self.format, Mx))

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        turns, lost = len(self.names), 0
        for place, own in self._turns(parts):
            given = [whole.reshape(rows, -1)[place::turns].copy().reshape(-1) for whole in inputs]
            if self.format.takes_codes(source):
                lost += self.format.recode(source, given, rows // turns, cols, own)
            else:  # MXFP4's bytes under other names
                for part, data in zip(own, given, strict=True):
                    part[:] = data
        return lost

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        for place, own in self._turns(parts):
            rows = np.empty((len(tile) // len(self.names), tile.shape[1]), "f4")
            self.format.decode(own, first_row // len(self.names), rows)
            tile[place :: len(self.names)] = rows

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        turns = len(self.names)
        return sum(self.format.encode(tile[place::turns].copy(), own) for place, own in self._turns(parts))

    def _turns(self, parts: Sequence[Bytes]) -> Iterator[tuple[int, Sequence[Bytes]]]:
        each = len(parts) // len(self.names)
        return ((place, parts[place * each : (place + 1) * each]) for place in range(len(self.names)))
