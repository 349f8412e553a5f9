"""Eight-bit floats: e4m3 codes and a scale for each block, row (channel) or weight (tensor).

| tensor | dtype, shape |
|---|---|
| weight | F8_E4M3 [out, in]; 4 exponent bits, 3 mantissa bits, no Inf, largest value 448 |
| block scale | [ceil(out / 128), ceil(in / 128)]; edge blocks may be short |
| channel scale | [out, 1] or [out] |
| tensor scale | [1], [] or [1, 1] |

DeepSeek-V3's layout calls its F32 block scale `weight_scale_inv` (the scale all the same, nothing is inverted), DeepSeek-V4's
`scale`; compressed-tensors' `float-quantized` calls a scale of any shape `weight_scale`, BF16 or F32 (F16 in old files).
Others use each name for a scale of any shape, so the shape says what it is of. A block scale may be a power of two, as
F8_E8M0 or as such bytes in U8.

Value of a weight: bf16(f32(code) * f32(scale)), whatever the scale's dtype. A scale of zero has codes of zero.
Quantising: scale = amax / 448, 1 where that is 0; code = e4m3(value / scale), an f32 division, half to even, saturating. A
BF16 scale is rounded first and the codes belong to the rounded scale. The scale of a tensor is divided in f64, from what
Format.reach knows of the weight and of those that engines fuse with it.
With powers of two (ue8m0): the smallest that is not less than amax / 448, 2^-127 at least, 1 where amax is 0. Where any power
of two reproduces every value of a block, this one does: a smaller scale only makes codes larger, and none is above 448. So
MXFP4 (and whatever was) keeps its values where those of a block, as multiples of 2^-9 of it, have four bits: where the
exponents of its groups that are not zero spread by 14 at most.
Sources: https://github.com/deepseek-ai/DeepSeek-V3 `inference/fp8_cast_bf16.py`;
https://github.com/deepseek-ai/DeepGEMM `deep_gemm/utils/math.py`, `per_block_cast_to_fp8` with `use_ue8m0` (which takes no amax
below 1e-4, and so a larger scale there);
https://github.com/vllm-project/compressed-tensors `compressors/naive_quantized`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kconvert.errors import Damaged, Unfit
from kconvert.formats.base import ZERO_POINT, Fate, Format, Part, refuse_surplus, require, scaled_by, unused_zero_points
from kconvert.formats.kernels import Kernels

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile
    from kconvert.formats.conventions import Convention

kernels = Kernels("fp8")
SCALES = ("weight_scale_inv", "weight_scale", "scale")
SUFFIXES = frozenset({"weight", ZERO_POINT, *SCALES})
E8M0 = ("F8_E8M0", "U8")
SCALE_DTYPES = {"F32": "f4", "BF16": "u2", "F16": "f2", **dict.fromkeys(E8M0, "u1")}
WRITTEN_SCALES = ("F32", "BF16", *E8M0)
LARGEST = 448.0
ONE = struct.pack("<f", 1.0)
STRATEGIES = ("block", "channel", "tensor")
# DeepSeek's quant_method, and what compressed-tensors calls the same encoding
KINDS = frozenset((format, "float") for format in ("fp8", "float-quantized", "naive-quantized"))
READS = "FP8 by block, channel and tensor, symmetric"


@dataclass(frozen=True, slots=True)
class Fp8(Format):
    """`strategy` is one of STRATEGIES, `block` counts for `block` only, `scale_name` is one of SCALES.

    `unused`: zero points that lie beside it. `powers`: its scales are powers of two, as those in E8M0 always are. `inputs`: a
    scale of activations, 1, is written beside it. Written are block and channel scales, in WRITTEN_SCALES, and F32 ones of
    tensors.

    How values become codes is no part of the encoding: `mse`: of a few scales the one with the least squared error
    (conventions.FP8_DIVISORS); `exact`: of powers of two, blocks that they do not reproduce are counted; `strict`: blocks that
    come back neither by them nor, where others may be, by amax are an error.
    """

    strategy: str = "block"
    block: tuple[int, int] = (128, 128)
    scale_name: str = "weight_scale_inv"
    scale_dtype: str = "F32"
    unused: tuple[Part, ...] = ()
    powers: bool = False
    inputs: bool = False
    mse: bool = field(default=False, compare=False)
    exact: bool = field(default=False, compare=False)
    strict: bool = field(default=False, compare=False)
    decodes_bf16 = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "powers", self.powers or self.scale_dtype in E8M0)

    def is_ragged(self, rows: int, cols: int) -> bool:
        """Whether the last blocks of such a matrix are cut off at an edge."""
        return self.strategy == "block" and bool(rows % self.block[0] or cols % self.block[1])

    @property
    def label(self) -> str:
        return "fp8 block {}x{}".format(*self.block) if self.strategy == "block" else f"fp8 {self.strategy}"

    @property
    def may_have_powers(self) -> bool:
        return self.powers

    @property
    def unit(self) -> str:
        return {"block": "block", "channel": "row"}.get(self.strategy, self.strategy)

    @property
    def usual(self) -> Fp8:
        scale_dtype = E8M0[0] if self.scale_dtype in E8M0 else self.scale_dtype
        return replace(self, scale_name=SCALES[0], scale_dtype=scale_dtype, unused=(), inputs=False)

    def by_rule(self, convention: Convention, group_size: int, strict: bool) -> Fp8:
        return replace(self, strict=strict)

    def with_powers(self) -> Fp8 | None:
        return replace(self, powers=True) if self.strategy == "block" else None

    def scaled(self, mse: bool) -> Fp8:
        return replace(self, mse=mse)

    @property
    def compares_scales(self) -> bool:
        return self.mse

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        """With powers of two also for what has such scales now: nothing else keeps its values. A float scale stays as it is, as
        engines read either."""
        if self.strategy == "tensor":
            kept = replace(self, mse=False, inputs=self.inputs and not isinstance(source, Fp8))
            return Format.fit(kept if kept == source else replace(self, mse=False), source, rows, cols, mse)
        strict = self.strict and not self._keeps(source)
        powers = self.powers or (source.quantised and source.may_have_powers)
        exact = strict or (powers and source.may_have_powers)
        format = replace(self, powers=powers, exact=exact, mse=mse and not powers)
        return Format.fit(format if format._with_scales_of(source) != source else source, source, rows, cols, mse)

    def _keeps(self, source: Format) -> bool:
        """Whether a weight that is spelt as `source` keeps its codes and scales, be it under other names."""
        return self._with_scales_of(source) == source or self.usual == source.usual

    def _with_scales_of(self, source: Format) -> Fp8:
        """With F32 or BF16 scales, whichever of the two the source has."""
        if isinstance(source, Fp8) and {source.scale_dtype, self.scale_dtype} == {"F32", "BF16"}:
            return replace(self, scale_dtype=source.scale_dtype)
        return self

    def fate(self, source: Format) -> Fate:
        """The rule's powers of two for the same blocks are never larger than the source's, and smaller ones lose nothing."""
        if not isinstance(source, Fp8):
            return "recovered" if self.exact else "lossy"
        had_powers = source.scale_dtype in E8M0 and source.block_shape(1, 1) == self.block_shape(1, 1)
        if had_powers or self._keeps(source):
            return "lossless"
        return "recovered" if self.exact else "lossy"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        every = {"block": self.block[0], "channel": 1}.get(self.strategy)
        scale = self._grid(rows, cols) if self.strategy != "tensor" else (1,)
        return (
            Part("weight", "F8_E4M3", (rows, cols)),
            Part(self.scale_name, self.scale_dtype, scale, every, values="nonnegative"),
            *([Part("input_scale", "F32", (), every=None, constant=ONE)] if self.inputs else []),
            *self.unused,
        )

    def reach(self, read: Callable[..., Iterator[list[Bytes]]]) -> float | None:
        return LARGEST * largest_scale((scale for (scale,) in read(1)), self.scale_dtype)

    def settles(self, source: Format) -> bool:
        return self.strategy == "tensor"

    def settle(self, reach: float, parts: Sequence[Bytes]) -> None:
        if self.strategy == "tensor":
            parts[1].view("f4")[0] = reach / LARGEST or 1

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        block_rows, block_cols = self.block_shape(*tile.shape)
        scale = widen(parts[1], self.scale_dtype).reshape(self._grid(*tile.shape))
        if kernels.decode_fp8(parts[0].reshape(tile.shape), scale, block_rows, block_cols, tile):
            raise Damaged("it has a scale of zero over codes that are not zero")
        if has_nan(parts[0]):
            raise Damaged("it has a code that is NaN")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        if self.scale_dtype not in (("F32",) if self.strategy == "tensor" else WRITTEN_SCALES):
            raise NotImplementedError(f"{self.label} with an {self.scale_dtype} scale is read, not written")
        if self.strategy == "tensor":
            lost = kernels.encode_by_scale(tile.reshape(-1), parts[1].view("f4")[0], parts[0])
            if lost < 0:
                raise Damaged("it has a value that is not finite")
            if lost and self.strict:
                raise Unfit(f"{lost:,} of its values are no code times its scale", "leave out --require-exact")
            return 0
        if self.powers:
            return self._encode_by_powers(tile, parts)
        if self.strict:
            return self._encode_strictly(tile, parts)
        block_rows, block_cols = self.block_shape(*tile.shape)
        rounded = self.scale_dtype == "BF16"
        blocks = self._grid(*tile.shape)
        scale = np.empty(blocks, np.float32) if rounded else parts[1].view("f4").reshape(blocks)
        codes, room = parts[0].reshape(tile.shape), np.empty((3, blocks[1]), np.int64)
        if kernels.encode_fp8(tile, block_rows, block_cols, rounded, self.mse, room, codes, scale):
            raise Damaged("it has a value that is not finite")
        if rounded:
            parts[1].view("u2")[:] = scale.reshape(-1).view("u4") >> 16
        return 0

    def _encode_strictly(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        """Block by block, by the power of two or, where that loses something, by amax: values that were FP8 come back by one of
        the two, or by none."""
        import numpy as np

        height, width = self.block_shape(*tile.shape)
        rounded, grid, lost = self.scale_dtype == "BF16", self._grid(*tile.shape), 0
        codes, scale = parts[0].reshape(tile.shape), np.empty(grid, np.float32)
        room = np.empty((3, 1), np.int64)
        for row, col in np.ndindex(grid):
            place = slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width)
            values = np.ascontiguousarray(tile[place])
            made, step, exponent = (
                np.empty(values.shape, np.uint8),
                np.empty((1, 1), np.float32),
                np.empty((1, 1), np.uint8),
            )
            if kernels.encode_by_powers(values, height, width, room.view("u4"), made, exponent):
                if kernels.encode_fp8(values, height, width, rounded, False, room, made, step):
                    raise Damaged("it has a value that is not finite")
                again = np.empty(values.shape, np.float32)
                kernels.decode_fp8(made, step, height, width, again)
                lost += not np.array_equal(again.view("u4"), values.view("u4"))
            else:
                step[:] = widen(exponent.reshape(-1), "F8_E8M0")
            codes[place], scale[row, col] = made, step[0, 0]
        if lost:
            raise Unfit(
                f"{lost:,} of its {self.unit}s have values that no codes and scale by amax or power of two reproduce",
                "leave out --require-exact",
            )
        flat = scale.reshape(-1)
        parts[1].view(SCALE_DTYPES[self.scale_dtype])[:] = flat.view("u4") >> 16 if rounded else flat
        return 0

    def _encode_by_powers(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        block_rows, block_cols = self.block_shape(*tile.shape)
        exponents = np.empty(self._grid(*tile.shape), np.uint8)
        room = np.empty((2, exponents.shape[1]), np.uint32)
        lost = kernels.encode_by_powers(tile, block_rows, block_cols, room, parts[0].reshape(tile.shape), exponents)
        if lost < 0:
            raise Damaged("it has a value that is not finite")
        if lost and self.strict:
            raise Unfit(
                f"{lost:,} of its {self.unit}s have values that no codes and power of two reproduce",
                f"leave out --require-exact, and such {self.unit}s are counted",
            )
        _narrow(exponents.reshape(-1), self.scale_dtype, parts[1])
        return lost if self.exact else 0

    def block_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """How many rows and columns of a weight or tile [rows, cols] share a scale."""
        if self.strategy == "block":
            return self.block
        return (1 if self.strategy == "channel" else max(rows, 1)), max(cols, 1)

    def _grid(self, rows: int, cols: int) -> tuple[int, int]:
        """How many scales a weight or tile [rows, cols] has, down and across."""
        if self.strategy == "block":
            return math.ceil(rows / self.block[0]), math.ceil(cols / self.block[1])
        return (rows if self.strategy == "channel" else 1), 1


def has_nan(codes: Bytes) -> bool:
    """Whether one of the codes is NaN."""
    rest = codes[codes.size // 8 * 8 :]
    return bool(kernels.has_nan(codes[: codes.size - rest.size].view("u8"), rest))


def widen(scale: Bytes, dtype: str) -> Tile:
    """The bytes of scales -> f32, exact, aligned."""
    import numpy as np

    values = scale.view(SCALE_DTYPES[dtype])
    if dtype == "BF16":
        return (values.astype("u4") << 16).view("f4")
    if dtype in E8M0:
        powers: Tile = np.ldexp(np.ones(len(values), "f4"), values.astype("i4") - 127)
        return powers
    return values.astype("f4")


def largest_scale(scales: Iterable[Bytes], dtype: str) -> float:
    """The largest magnitude of scales, in pieces."""
    import numpy as np

    return max((float(np.abs(widen(scale, dtype)).max(initial=0)) for scale in scales), default=0.0)


def _narrow(exponents: Bytes, dtype: str, scale: Bytes) -> None:
    """2 ** (exponents - 127) -> the bytes of scales, exact."""
    import numpy as np

    if dtype in E8M0:
        scale[:] = exponents
    elif dtype == "F32":
        scale.view("f4")[:] = np.ldexp(np.ones(len(exponents), "f4"), exponents.astype("i4") - 127)
    else:
        scale.view("u2")[:] = np.maximum(exponents.astype("u2") << 7, 1 << 6)


def from_scheme(scheme: Scheme) -> Fp8 | None:
    """See formats.base.Family."""
    if (scheme.format, scheme.type) not in KINDS or scheme.num_bits != 8 or not scheme.symmetric:
        return None
    if scheme.strategy == "block" and scheme.block is not None:
        if scheme.format == "fp8":
            return Fp8("block", scheme.block, powers=scheme.powers)
        return Fp8("block", scheme.block, "weight_scale", "BF16", powers=scheme.powers)
    if scheme.strategy in ("channel", "tensor"):
        return Fp8(scheme.strategy, scale_name="weight_scale", scale_dtype="BF16")
    return None


def recognise(declared: Fp8, found: Found, shape: tuple[int, int] | None) -> tuple[Fp8, tuple[int, int]]:
    """See formats.base.Family."""
    name = next((name for name in SCALES if name in found), declared.scale_name)
    require(found, "weight", name)
    refuse_surplus(found, {"weight", name, ZERO_POINT})
    dtype, own_shape = found["weight"]
    if dtype != "F8_E4M3" or len(own_shape) != 2:
        raise ValueError(f"its weight is {dtype} {list(own_shape)}, not an F8_E4M3 matrix")
    rows, cols = own_shape
    scale_dtype, scale_shape = found[name]
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"its {name} is {scale_dtype}, not one of {', '.join(SCALE_DTYPES)}")
    strategy = _strategy(declared, (rows, cols), scale_shape)
    if scale_dtype == "U8" and strategy != "block":
        raise ValueError(f"its {name} is U8, which is an exponent only where it is of blocks")
    format = replace(declared, strategy=strategy, scale_name=name, scale_dtype=scale_dtype)
    return replace(format, unused=unused_zero_points(found, rows)), shape or (rows, cols)


def _strategy(declared: Fp8, shape: tuple[int, int], scale: tuple[int, ...]) -> str:
    """What a scale of this shape is of. [1, 1] may also be what is left of a grid of blocks."""
    if declared.strategy == "block":
        is_grid = declared.parts(*shape)[1].fits(declared.scale_dtype, scale)
        return "block" if is_grid or scale == (1, 1) else scaled_by("block", shape[0], scale)
    strategy = scaled_by(declared.strategy, shape[0], scale)
    if math.prod(scale) != 1 and strategy == "tensor":
        raise ValueError(f"its scale {list(scale)} is neither one number nor one for each row of {list(shape)}")
    return strategy
