"""KTransformers' AMXINT4 and AMXINT8: integers with one scale a row, in the order in which AMX tiles read them.

A weight is split among NUMA nodes first and then quantised: gate and up by rows, down by columns. Shard N of it is

| tensor | dtype, shape |
|---|---|
| numa.N.weight | I8 [n * k * bits / 8], the codes of its rows n and columns k in AMX order |
| numa.N.scale | F32 [n] |

Value of a weight: code * scale for eight bits, code * 16 * scale for four, whose codes lie in [-7, 7].
Quantising: values are rounded to bf16, subnormal numbers count as zero, also as scales. By `amax` as kt-kernel does, in f32:

    scale = amax / 112 (four bits), amax * f32(1 / 127) (eight bits)
    v = round_half_even(value * (1 / scale)), all 0 where the scale is
    code = v (eight bits), sign(v) * ((|v| + 8) >> 4) (four bits)

By `mse` the scale is that of amax times a power of two in eighths, and the code the nearest. The search goes down from the
scale of amax by half octaves as long as the squared error of the row shrinks, then tries a quarter and an eighth of an
octave to both sides of the best.

Order of bytes: blocks of 128 rows (four bits) or 64 (eight), in a block blocks of 3584 columns, in those 32 rows at a time,
of which 64 bytes each, as two halves of 16 rows: 16 times the next word of four bytes of each row. A byte of four-bit codes
holds, of 128 columns, column j in its low and column j + 64 in its high nibble, as two's complements.
Source: https://github.com/kvcache-ai/ktransformers, `kt-kernel/operators/amx`; bytes compared with kt-kernel 0.7.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from kconvert.errors import Damaged
from kconvert.formats.base import Fate, Format, Part
from kconvert.formats.kernels import Kernels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kconvert.formats.base import Bytes, Tile

kernels = Kernels("amx")
Split = Literal["rows", "cols"]
N = "([0-9]{1,9})"
TENSOR = re.compile(rf"(blk\.{N}\.ffn_(gate|up|down)_exps\.{N})\.(numa\.{N}\.(?:weight|scale))")
# What KTransformers calls them -> the bits of their codes.
METHODS = {"AMXINT4": 4, "AMXINT8": 8}


@dataclass(frozen=True, slots=True)
class Amx(Format):
    """`bits` are 4 or 8. A weight is cut into `numa` shards of as many rows or columns, as `split` says.

    How the scales were made is no part of the encoding, the loader takes any. `mse`: by least squared error, None: that is not
    known. `pieces`: so many neighbouring shards of columns were one when they got their scales.
    """

    bits: int
    numa: int = 1
    split: Split = "rows"
    mse: bool | None = field(default=False, compare=False)
    pieces: int = field(default=1, compare=False)

    @property
    def label(self) -> str:
        return f"amxint{self.bits}"

    def scaled(self, mse: bool) -> Amx:
        return replace(self, mse=mse)

    @property
    def compares_scales(self) -> bool:
        """By either rule: a row has one scale, and much depends on it."""
        return True

    def of_rows(self) -> Amx:
        """Which rows are in a shard changes nothing for each of them."""
        return replace(self, numa=1) if self.split == "rows" else self

    @property
    def block(self) -> int:
        """Rows of a block, and columns that 64 bytes hold: rows and columns of a shard are multiples of it."""
        return 512 // self.bits

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """Of each shard the weight and the scale."""
        by_rows = self.split == "rows"
        units = (self.block * self.numa, self.block) if by_rows else (self.block, self.block * self.numa)
        if rows % units[0] or cols % units[1]:
            raise ValueError(f"its shape is no multiple of {list(units)}")
        height, width = (rows // self.numa, cols) if by_rows else (rows, cols // self.numa)
        parts = []
        for n in range(self.numa):
            own = (n * height, (n + 1) * height) if by_rows else None
            weight = (height * width * self.bits // 8,)
            parts.append(Part(f"numa.{n}.weight", "I8", weight, every=self.block, rows=own))
            parts.append(Part(f"numa.{n}.scale", "F32", (height,), values="nonnegative", rows=own))
        return tuple(parts)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        for (rows, first, words), scale in zip(self.shards(parts[::2], tile), parts[1::2], strict=True):
            kernels.decode_rows(words, scale.view("f4"), self.bits, first, _half_of(words), rows)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        for (rows, first, words), scale in zip(self.shards(parts[::2], tile), parts[1::2], strict=True):
            k = words.shape[1] * 32 // self.bits
            room = np.empty(k, np.float32), np.empty(k, np.uint8), _half_of(words)
            if kernels.encode_rows(rows, first, self.bits, bool(self.mse), *room, words, scale.view("f4")):
                raise Damaged("it has a value that is not finite")
        return 0

    def shards(self, weights: Sequence[Bytes], tile: Tile) -> Iterator[tuple[Tile, int, NDArray[np.uint32]]]:
        """The tile's rows that are each shard's, its first column, and its words [rows, k * bits / 32]."""
        width = tile.shape[1] // (self.numa if self.split == "cols" else 1)
        row = 0
        for n, weight in enumerate(weights):
            words = weight.view("u4").reshape(-1, width * self.bits // 32)
            if self.split == "cols":
                yield tile, n * width, words
            else:
                yield tile[row : row + len(words)], 0, words
                row += len(words)


def _half_of(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Room for the words of 16 rows, half of those that AMX takes at once."""
    import numpy as np

    return np.empty((16, words.shape[1]), np.uint32)


@dataclass(frozen=True, slots=True)
class AmxCodes(Format):
    """The weights of Amx without the scales; the tile's values are the codes. For other shards of the same codes."""

    amx: Amx

    @property
    def label(self) -> str:
        return f"{self.amx.label} numa {self.amx.numa}"

    def fate(self, source: Format) -> Fate:
        return "lossless"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return self.amx.parts(rows, cols)[::2]

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        for rows, first, words in self.amx.shards(parts, tile):
            kernels.decode_rows(words, None, self.amx.bits, first, _half_of(words), rows)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        for rows, first, words in self.amx.shards(parts, tile):
            codes = np.empty(words.shape[1] * 32 // self.amx.bits, np.uint8)
            kernels.encode_codes(rows, first, self.amx.bits, codes, _half_of(words), words)
        return 0


@dataclass(frozen=True, slots=True)
class AmxScales(Format):
    """The scales of Amx alone, of a weight [rows, cols]: the tile is [rows, 1] for shards of rows; for shards of columns it
    has a column for each shard of the finer side, and a shard that is cut keeps its scale in all pieces."""

    amx: Amx
    cols: int

    @property
    def label(self) -> str:
        return f"scales numa {self.amx.numa}"

    def fate(self, source: Format) -> Fate:
        return "lossless"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return self.amx.parts(rows, self.cols)[1::2]

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        row = 0
        for n, part in enumerate(parts):
            scale = part.view("f4")
            if self.amx.split == "rows":
                tile[row : row + len(scale), 0] = scale
                row += len(scale)
            else:
                each = tile.shape[1] // self.amx.numa
                tile[:, n * each : (n + 1) * each] = scale[:, None]

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        row = 0
        for n, part in enumerate(parts):
            scale = part.view("f4")
            if self.amx.split == "rows":
                scale[:] = tile[row : row + len(scale), 0]
                row += len(scale)
            else:
                scale[:] = tile[:, n]
        return 0
