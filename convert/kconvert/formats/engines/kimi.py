"""What llama.cpp has computed of Kimi-K3's tensors: the weights of residuals, and how fast what a layer remembers decays.

| tensor | of the source | value |
|---|---|---|
| `…_res_score` F32 [hidden] | a norm [hidden], a projection [1, hidden] | norm * projection in F32, exact of BF16 |
| `ssm_a` F32 [heads] | A_log F32, of each head, and zeros behind | -exp(A_log), computed in F64 and rounded once |

Source: https://github.com/ggml-org/llama.cpp, `conversion/kimi_k3.py`, `src/models/kimi-k3.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kconvert.formats.base import Fate, Format, Part
from kconvert.formats.dense import Dense

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Tile


@dataclass(frozen=True, slots=True)
class Product(Format):
    """Two vectors of these dtypes, whose product is the weight [1, n]. Read only."""

    dtypes: tuple[str, str]

    @property
    def label(self) -> str:
        return " times ".join(dtype.lower() for dtype in self.dtypes)

    @property
    def quantised(self) -> bool:
        return False

    @property
    def value_dtype(self) -> str:
        return "F32"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        norm, projection = self.dtypes
        return Part("norm", norm, (rows, cols)), Part("projection", projection, (rows, cols))

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        other = np.empty_like(tile)
        for dtype, part, values in zip(self.dtypes, parts, (tile, other), strict=True):
            Dense(dtype).decode([part], first_row, values)
        tile *= other


@dataclass(frozen=True, slots=True)
class Decay(Format):
    """The first numbers of a weight [1, n], one of each of `heads`. Written only."""

    heads: int

    @property
    def label(self) -> str:
        return "f32 of exponents"

    @property
    def quantised(self) -> bool:
        return False

    def fate(self, source: Format) -> Fate:
        """The model itself computes just this when it runs, of which no encoding has more."""
        return "lossless"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return (Part("", "F32", (self.heads,)),)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        with np.errstate(over="ignore"):
            values = (-np.exp(tile[0, : self.heads].astype(np.float64))).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it has an exponent that is too large for F32, or not finite")
        parts[0].view("f4")[:] = values
        return 0
