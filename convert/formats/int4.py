"""compressed-tensors `pack-quantized`: four-bit integers, eight to an I32 word, a scale for each group of a row.

| tensor | dtype, shape |
|---|---|
| weight_packed | I32 [out, ceil(in / 8)]; nibble j of word w (little endian) is column 8w + j; stored value = code + 8 |
| weight_scale | BF16 [out, in / group], or [out, 1] for channel scales |
| weight_shape | I32 or I64 [2] = [out, in]; may be absent |

Value of a weight: bf16(code * scale): the product of a four-bit code and a bf16 scale is exact in f32, so one rounding.
Quantising: scale = bf16(amax / divisor) of the group, code = clamp(round_half_even(value / scale), lowest, 7).
Source: https://github.com/vllm-project/compressed-tensors, `compressors/pack_quantized`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kconvert.formats.base import Part

if TYPE_CHECKING:
    from kconvert.checkpoint.config import Scheme
    from kconvert.formats.base import Bytes, Tile

SUFFIXES = frozenset({"weight_packed", "weight_scale", "weight_shape"})
SHAPE_CODES = {"I32": "<2i", "I64": "<2q"}


@dataclass(frozen=True, slots=True)
class Convention:
    """A rule that makes codes from values: scale = bf16(amax / divisor), codes from `lowest` to 7."""

    divisor: float
    lowest: int


KIMI = Convention(7.0, -7)


@dataclass(frozen=True, slots=True)
class Int4:
    """`group_size` columns share a scale, None: the whole row. `shape_dtype` None: there is no weight_shape tensor."""

    group_size: int | None
    shape_dtype: str | None = "I32"
    convention: Convention = KIMI

    @property
    def label(self) -> str:
        return f"int4 group {self.group_size}" if self.group_size else "int4 channel"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        groups = cols // self.group_size if self.group_size else 1
        packed = Part("weight_packed", "I32", (rows, math.ceil(cols / 8)))
        scale = Part("weight_scale", "BF16", (rows, groups), values="nonnegative")
        if self.shape_dtype is None:
            return packed, scale
        shape = struct.pack(SHAPE_CODES[self.shape_dtype], rows, cols)
        return packed, scale, Part("weight_shape", self.shape_dtype, (2,), every=None, constant=shape)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        from kconvert.formats.kernels import int4 as kernels

        groups = tile.reshape(-1, self.group_size or tile.shape[1])
        kernels.decode_int4(parts[0].reshape(len(groups), -1), parts[1].view("u2"), groups)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        from kconvert.formats.kernels import int4 as kernels

        groups = tile.reshape(-1, self.group_size or tile.shape[1])
        divisor, lowest = self.convention.divisor, self.convention.lowest
        codes = parts[0].reshape(len(groups), -1)
        kernels.encode_int4(groups, groups.dtype.type(divisor), groups.dtype.type(lowest), codes, parts[1].view("u2"))
        return 0


def from_scheme(scheme: Scheme) -> Int4 | None:
    """See formats.base.Family."""
    if scheme.format == "pack-quantized" and scheme.num_bits == 4 and scheme.type == "int" and scheme.symmetric:
        return Int4(scheme.group_size)
    return None


def recognise(
    scheme: Scheme | None, found: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int] | None
) -> tuple[Int4, tuple[int, int]]:
    """See formats.base.Family."""
    if scheme is None:
        raise ValueError("config.json declares no quantisation for it")
    if from_scheme(scheme) is None:
        raise ValueError(f"its scheme {scheme} is not supported; supported: pack-quantized int4, symmetric")
    if "weight_packed" not in found or "weight_scale" not in found:
        missing = "weight_packed" if "weight_packed" not in found else "weight_scale"
        raise ValueError(f"it has no {missing}")
    packed, scale = found["weight_packed"][1], found["weight_scale"][1]
    if shape is None:
        if len(packed) != 2 or len(scale) != 2:
            raise ValueError(f"its weight_packed {list(packed)} and weight_scale {list(scale)} are not matrices")
        shape = (packed[0], scale[1] * scheme.group_size if scheme.group_size else packed[1] * 8)
    if scheme.group_size and (shape[1] % scheme.group_size or scheme.group_size % 8):
        raise ValueError(f"its {shape[1]} columns do not divide into groups of {scheme.group_size}")
    shape_dtype = found["weight_shape"][0] if "weight_shape" in found else None
    if shape_dtype is not None and shape_dtype not in SHAPE_CODES:
        raise ValueError(f"its weight_shape is {shape_dtype}, not I32 or I64")
    return Int4(scheme.group_size, shape_dtype), shape
