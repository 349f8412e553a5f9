"""compressed-tensors `pack-quantized`: four- or eight-bit integers, packed into I32 words, a scale for each group of a row.

| tensor | dtype, shape |
|---|---|
| weight_packed | I32 [out, ceil(in * bits / 32)]; little endian, the first column lowest; stored value = code + 8, or + 128 |
| weight_scale | BF16, F16 or F32 [out, in / group], or [out, 1] for channel scales |
| weight_zero_point | asymmetric: I32 [ceil(out * bits / 32), in / group], packed down the rows with the same offset; |
| | in old files I8 [out, in / group], also of zeros beside symmetric codes |
| weight_g_idx | old files with activation order: I32 [in], the group of each column |
| weight_shape | I32 or I64 [2] = [out, in]; may be absent |

A stack of experts has one dimension more in front of all but weight_g_idx, and weight_shape is [3] = [experts, out, in].
Its rows are the experts' rows, one after the other.

Value of a weight: (code - zero point) * scale, rounded once to the scale's dtype: all that comes before is exact in f32. A
scale may be negative (auto-round makes the code of a group's largest value -8, and a code of zero then means -0).
Quantising (four bits, symmetric, bf16 scales) goes by a convention, see formats.conventions; or `exact`: where a bf16
scale and codes reproduce every value of a group to the bit, as after decoding, they are found again, see kernels.packed.
Source: https://github.com/vllm-project/compressed-tensors, `compressors/pack_quantized`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kconvert.errors import Damaged, Unfit, some_have
from kconvert.formats.base import (
    COUNTED,
    ZERO_POINT,
    Fate,
    Format,
    Part,
    check_form,
    check_groups,
    refuse_surplus,
    require,
    unused_zero_points,
)
from kconvert.formats.conventions import KIMI, Convention
from kconvert.formats.fp8 import largest_scale
from kconvert.formats.kernels import Kernels

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

SUFFIXES = frozenset({"weight_packed", "weight_scale", ZERO_POINT, "weight_g_idx", "weight_shape"})
KINDS = frozenset({("pack-quantized", "int")})
READS = "integers of four and eight bits by group and channel"
SHAPE_CODES = {"I32": "i", "I64": "q"}
kernels = Kernels("packed")
SCALE_CODES = {"BF16": "u2", "F16": "i2", "F32": "f4"}  # as kernels.bits.widen_scale tells them apart
ZERO_CODES = {"I32": "u4", "I8": "i1"}


@dataclass(frozen=True, slots=True)
class Packed(Format):
    """`group_size` columns share a scale, None: the whole row. `shape_dtype` None: there is no weight_shape tensor.
    `stack`: the number of matrices if it is a stack of them. `unused`: zero points that lie beside symmetric codes.

    How values become codes is no part of the encoding, so formats that differ in this are equal: the `convention`; `exact`:
    codes and scale that reproduce a group are found again where there are any; `strict`: where there are none is an error;
    `mse`: of a few scales the one with the least squared error (conventions.DIVISORS).
    """

    group_size: int | None
    shape_dtype: str | None = "I32"
    convention: Convention = field(default=KIMI, compare=False)
    bits: int = 4
    symmetric: bool = True
    zero_dtype: str = "I32"
    scale_dtype: str = "BF16"
    ordered: bool = False
    stack: int | None = None
    unused: tuple[Part, ...] = ()
    exact: bool = field(default=False, compare=False)
    mse: bool = field(default=False, compare=False)
    strict: bool = field(default=False, compare=False)
    decodes_bf16 = True

    @property
    def label(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "channel"
        packed = "" if self.bits == 4 else " packed"
        return f"int{self.bits}{packed} {group}" + ("" if self.symmetric else " asymmetric") + " ordered" * self.ordered

    @property
    def value_dtype(self) -> str:
        """Integers are multiplied in their scale's dtype."""
        return self.scale_dtype

    @property
    def recoverable(self) -> bool:
        return True

    def scaled(self, mse: bool) -> Packed:
        return replace(self, mse=mse)

    @property
    def compares_scales(self) -> bool:
        return self.mse

    def by_rule(self, convention: Convention, group_size: int, strict: bool) -> Packed:
        return replace(self, group_size=group_size, convention=convention, strict=strict)

    @property
    def matrices(self) -> int | None:
        return self.stack

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        check_groups(cols, self.group_size)
        check_form(source, rows)
        exact = (self.strict or source.recoverable) and not mse
        return replace(self, stack=source.matrices, exact=exact, mse=mse)

    def fate(self, source: Format) -> Fate:
        return "recovered" if self.exact else "lossy"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if self.group_size and cols % self.group_size:
            raise ValueError(f"its {cols} columns do not divide into groups of {self.group_size}")
        groups = cols // self.group_size if self.group_size else 1
        in_word = 32 // self.bits
        stack, rows = ((), rows) if self.stack is None else ((self.stack,), rows // self.stack)
        parts = [
            Part("weight_packed", "I32", (*stack, rows, math.ceil(cols / in_word))),
            Part("weight_scale", self.scale_dtype, (*stack, rows, groups), values="finite"),
        ]
        if not self.symmetric and self.zero_dtype == "I8":
            parts.append(Part(ZERO_POINT, "I8", (*stack, rows, groups)))
        elif not self.symmetric:
            words = math.ceil(rows / in_word)
            parts.append(Part(ZERO_POINT, "I32", (*stack, words, groups), every=in_word))
        if self.ordered:
            parts.append(Part("weight_g_idx", "I32", (cols,), every=None, below=groups))
        if self.shape_dtype is not None:
            shape = (*stack, rows, cols)
            data = struct.pack(f"<{len(shape)}{SHAPE_CODES[self.shape_dtype]}", *shape)
            parts.append(Part("weight_shape", self.shape_dtype, (len(shape),), every=None, constant=data))
        return (*parts, *self.unused)

    def reach(self, read: Callable[..., Iterator[list[Bytes]]]) -> float | None:
        """With zero points codes may be as far from zero as the grid is wide."""
        widest = float(1 << (self.bits - self.symmetric))
        return widest * largest_scale((scale for (scale,) in read(1)), self.scale_dtype)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        if not tile.size:
            return
        rows = len(tile)
        codes = parts[0].reshape(rows, -1)
        scale = parts[1].view(SCALE_CODES[self.scale_dtype]).reshape(rows, -1)
        groups = scale.shape[1]
        zero = None if self.symmetric else parts[2].view(ZERO_CODES[self.zero_dtype]).reshape(-1, groups)
        if self.ordered:
            index = parts[3 - self.symmetric].view("i4")
            senseless = kernels.decode_indexed(codes, self.bits, scale, zero, index, tile)
        else:
            spread = np.empty(tile.shape[1], np.uint8)
            senseless = kernels.decode(codes, self.bits, scale, zero, spread, tile.reshape(rows, groups, -1))
        if senseless:
            raise Damaged("it has a scale of zero over codes that are not zero")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        if (self.bits, self.symmetric, self.scale_dtype, self.ordered) != (4, True, "BF16", False):
            raise NotImplementedError(f"nothing is written as {self.label}")
        size = self.group_size or tile.shape[1]
        groups = tile.reshape(tile.size // size if size else len(tile), size)
        rule = self.convention
        by_scale = kernels.encode_mse if self.mse else kernels.encode_rule
        kernel = kernels.encode_exact if self.exact else by_scale
        lost = kernel(
            groups,
            groups.dtype.type(rule.divisor),
            groups.dtype.type(rule.lowest),
            rule.rounds,
            rule.zero_bits,
            np.empty(size, np.uint8),
            parts[0].reshape(len(groups), size // 2),
            parts[1].view("u2"),
        )
        if lost < 0:
            raise Damaged("it has a value that is not finite")
        if lost and self.strict:
            raise Unfit(f"{some_have(lost, 'groups')} values that no codes and bf16 scale reproduce", COUNTED)
        return lost


def from_scheme(scheme: Scheme) -> Packed | None:
    """See formats.base.Family."""
    if (scheme.format, scheme.type) not in KINDS or scheme.num_bits not in (4, 8):
        return None
    if scheme.strategy not in ("group", "channel"):
        return None
    return Packed(scheme.group_size, bits=scheme.num_bits, symmetric=scheme.symmetric)


def recognise(declared: Packed, found: Found, shape: tuple[int, int] | None) -> tuple[Packed, tuple[int, int]]:
    """See formats.base.Family."""
    require(found, "weight_packed", "weight_scale", *(() if declared.symmetric else (ZERO_POINT,)))
    refuse_surplus(found, SUFFIXES)
    packed, (scale_dtype, scale) = found["weight_packed"][1], found["weight_scale"]
    stack = packed[0] if shape is None and len(packed) == 3 else None
    if len(packed) != (2 if stack is None else 3):
        raise ValueError(f"its weight_packed {list(packed)} is no matrix" + " or stack of them" * (shape is None))
    if stack == 0:
        raise ValueError("it is a stack of no matrices")
    if shape is None:
        groups = scale[-1] if len(scale) == len(packed) else 1
        cols = groups * declared.group_size if declared.group_size else packed[-1] * 32 // declared.bits
        shape = (math.prod(packed[:-1]), cols)
    if scale_dtype not in SCALE_CODES:
        scale_dtype = declared.scale_dtype  # which the tensor then disagrees with
    format = replace(declared, stack=stack, scale_dtype=scale_dtype, ordered="weight_g_idx" in found)
    return _with_companions(format, found, packed[-2]), shape


def _with_companions(format: Packed, found: Found, rows: int) -> Packed:
    """The format with the dtypes of shape and zero points as they are; a matrix has `rows` rows."""
    shape_dtype = found["weight_shape"][0] if "weight_shape" in found else None
    if shape_dtype is not None and shape_dtype not in SHAPE_CODES:
        raise ValueError(f"its weight_shape is {shape_dtype}, not I32 or I64")
    format = replace(format, shape_dtype=shape_dtype)
    if format.symmetric:
        return replace(format, unused=unused_zero_points(found, rows, format.bits))
    zero_dtype = found[ZERO_POINT][0]
    if zero_dtype not in ZERO_CODES:
        raise ValueError(f"its {ZERO_POINT} is {zero_dtype}, not I32 or I8")
    if format.stack and zero_dtype == "I32" and rows % (32 // format.bits):
        raise ValueError(f"the zero points of its {rows} rows end within a word, in a stack that is not supported")
    return replace(format, zero_dtype=zero_dtype)
