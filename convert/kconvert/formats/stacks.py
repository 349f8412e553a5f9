"""gpt-oss: the matrices of a layer's experts stacked in one tensor, whose name is the weight's own.

| format | tensor | dtype, shape |
|---|---|---|
| mxfp4 stack | {weight}_blocks | U8 [stack, out, in / 32, 16]; e2m1 codes, the first column in the low nibble |
| | {weight}_scales | U8 [stack, out, in / 32]; the exponent + 127 |
| bf16 stack, transposed (formats.dense) | {weight} | BF16 [stack, in, out] |

Values are those of MXFP4, see formats.mx. The rows of gate and up take turns and stay where they are.
Source: https://github.com/huggingface/transformers, `integrations/mxfp4.py` and `models/gpt_oss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kconvert.formats.base import Format, Part
from kconvert.formats.dense import DTYPES, Dense
from kconvert.formats.mx import GROUP, Mx

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

SUFFIXES = frozenset({"", "_blocks", "_scales"})
KINDS: frozenset[tuple[str, str]] = frozenset()
READS = ""


@dataclass(frozen=True, slots=True)
class MxStack(Format):
    """`stack` is the number of matrices; the rows of a weight are those of the first matrix, then of the next.

    `exact`: groups that come back keep their values, see Mx.
    """

    stack: int
    exact: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        return "mxfp4 stack"

    def height(self, rows: int) -> int | None:
        return rows // self.stack

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % GROUP:
            raise ValueError(f"its {cols} columns do not divide into groups of {GROUP}")
        groups = (self.stack, rows // self.stack, cols // GROUP)
        return Part("_blocks", "U8", (*groups, GROUP // 2)), Part("_scales", "U8", groups, values="positive")

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        Mx(4).decode(parts, first_row, tile)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        return Mx(4, exact=self.exact).encode(tile, parts)


def from_scheme(scheme: Scheme) -> None:
    """See formats.base.Family."""


def recognise(declared: None, found: Found, shape: tuple[int, int] | None) -> tuple[MxStack | Dense, tuple[int, int]]:
    """See formats.base.Family."""
    if found.keys() not in ({""}, {"_blocks", "_scales"}):
        raise ValueError(f"it needs either blocks and scales or a tensor of its own name, and has {sorted(found)}")
    dtype, own_shape = found[""] if "" in found else found["_scales"]
    groups = found["_blocks"][1][:-1] if "_blocks" in found else ()
    if len(groups) == 3 and (groups[0] * groups[1], groups[2] * GROUP) == shape:
        own_shape = groups  # what is wrong are the scales, if they differ
    if len(own_shape) != 3 or 0 in own_shape:
        raise ValueError(f"its shape {list(own_shape)} is no stack of matrices")
    stack, first, second = own_shape
    if "" not in found:
        return MxStack(stack), shape or (stack * first, second * GROUP)
    if dtype not in DTYPES:
        raise ValueError(f"it is {dtype}, not one of {', '.join(DTYPES)}")
    return Dense(dtype, transposed=second), shape or (stack * second, first)
