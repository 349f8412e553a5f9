"""Plain floating-point weights: one tensor, `weight`, BF16 [out, in]; half to even when rounding from f32.

The transposed stacks of formats.stacks have the weight's own name and the matrices' rows as columns, [stack, in, out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import Fate, Format, Part, check_form
from kconvert.formats.kernels import Kernels

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

SUFFIXES = frozenset({"weight"})
kernels = Kernels("dense")
DTYPES = ("BF16", "F16", "F32")
KINDS: frozenset[tuple[str, str]] = frozenset()
READS = ""
# What the tools leave beside a weight that they quantised for training only, or meant to quantise and did not.
LEFTOVERS = frozenset(
    f"weight_{fact}" for fact in ("scale", "scale_inv", "scale_2", "global_scale", "zero_point", "g_idx", "shape")
)


@dataclass(frozen=True, slots=True)
class Dense(Format):
    """`dtype` is one of DTYPES; `stack`: the number of matrices if it is a stack of them, [stack, out, in].

    `transposed`: the rows of each matrix if it is a stack of transposed ones, [stack, in, out].
    """

    dtype: str = "BF16"
    stack: int | None = None
    transposed: int | None = None

    @property
    def label(self) -> str:
        return self.dtype.lower()

    @property
    def quantised(self) -> bool:
        return False

    @property
    def value_dtype(self) -> str:
        return self.dtype

    @property
    def recoverable(self) -> bool:
        return True

    @property
    def may_have_powers(self) -> bool:
        return True

    @property
    def matrices(self) -> int | None:
        return self.stack

    def height(self, rows: int) -> int | None:
        return self.transposed

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        if (height := source.height(rows)) is None:
            return replace(self, stack=source.matrices) if source.matrices is not None else self
        if self != Dense("BF16"):
            check_form(source, rows)
        return replace(self, transposed=height) if source.quantised else source

    def fate(self, source: Format) -> Fate:
        """F32 holds the values of any encoding."""
        return "lossless" if self.dtype in ("F32", source.value_dtype) else "lossy"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if self.transposed is not None:
            return (Part("", self.dtype, (rows // self.transposed, cols, self.transposed), every=self.transposed),)
        shape = (rows, cols) if self.stack is None else (self.stack, rows // self.stack, cols)
        return (Part("weight", self.dtype, shape),)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        if self.transposed is not None:
            raise NotImplementedError("transposed stacks are copied, never read")
        if self.dtype == "BF16":
            kernels.decode_bf16(parts[0].view("u2"), tile.reshape(-1))
        else:
            tile.reshape(-1)[:] = parts[0].view("f2" if self.dtype == "F16" else "f4")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        if self.transposed is not None:
            matrices = tile.reshape(-1, self.transposed, tile.shape[1])
            kernels.encode_transposed(matrices, parts[0].view("u2").reshape(matrices.swapaxes(1, 2).shape))
        elif self.dtype == "BF16":
            kernels.encode_bf16(tile.reshape(-1), parts[0].view("u2"))
        else:
            self._round(tile, parts[0])
        return 0

    def _round(self, tile: Tile, part: Bytes) -> None:
        """To F16 or F32, half to even."""
        import numpy as np

        values = part.view("f2" if self.dtype == "F16" else "f4")
        with np.errstate(over="ignore"):
            values[:] = tile.reshape(-1)
        if not np.isfinite(values).all():
            raise ValueError(f"it has a value that {self.dtype} cannot hold")


def from_scheme(scheme: Scheme) -> None:
    """See formats.base.Family."""


def holds(found: Found) -> bool:
    """Whether these tensors are a plain weight, whatever config.json says and whatever scale lies beside it: an encoding has
    no floats for codes."""
    return found.keys() <= {"weight", *LEFTOVERS} and "weight" in found and found["weight"][0] in DTYPES


def recognise(declared: None, found: Found, shape: tuple[int, int] | None) -> tuple[Dense, tuple[int, int]]:
    """See formats.base.Family."""
    dtype, own_shape = found["weight"]
    if dtype not in DTYPES:
        raise ValueError(f"its weight is {dtype} and nothing beside it is read as its scale")
    if len(own_shape) != 2:
        raise ValueError(f"its weight {list(own_shape)} is not a matrix")
    return Dense(dtype), shape or (own_shape[0], own_shape[1])
