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
BF16 scale is rounded first and the codes belong to the rounded scale.
Sources: https://github.com/deepseek-ai/DeepSeek-V3 `inference/fp8_cast_bf16.py`;
https://github.com/vllm-project/compressed-tensors `compressors/naive_quantized`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import ZERO_POINT, Format, Part, refuse_surplus, require, scaled_by, unused_zero_points

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

SCALES = ("weight_scale_inv", "weight_scale", "scale")
SUFFIXES = frozenset({"weight", ZERO_POINT, *SCALES})
E8M0 = ("F8_E8M0", "U8")
SCALE_DTYPES = {"F32": "f4", "BF16": "u2", "F16": "f2", **dict.fromkeys(E8M0, "u1")}
WRITTEN_SCALES = ("F32", "BF16")
STRATEGIES = ("block", "channel", "tensor")
# DeepSeek's quant_method, and what compressed-tensors calls the same encoding
KINDS = frozenset((format, "float") for format in ("fp8", "float-quantized", "naive-quantized"))
READS = "FP8 by block, channel and tensor, symmetric"


@dataclass(frozen=True, slots=True)
class Fp8(Format):
    """`strategy` is one of STRATEGIES, `block` counts for `block` only, `scale_name` is one of SCALES.

    `unused`: zero points that lie beside it. Written are block and channel scales, F32 or BF16. `mse`: of a few scales the one
    with the least squared error (conventions.FP8_DIVISORS); no part of the encoding.
    """

    strategy: str = "block"
    block: tuple[int, int] = (128, 128)
    scale_name: str = "weight_scale_inv"
    scale_dtype: str = "F32"
    unused: tuple[Part, ...] = ()
    mse: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        return "fp8 block {}x{}".format(*self.block) if self.strategy == "block" else f"fp8 {self.strategy}"

    def scaled(self, mse: bool) -> Fp8:
        return replace(self, mse=mse)

    @property
    def compares_scales(self) -> bool:
        return self.mse

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        return Format.fit(self.scaled(mse), source, rows, cols, mse)

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        every = {"block": self.block[0], "channel": 1}.get(self.strategy)
        scale = self._grid(rows, cols) if self.strategy != "tensor" else (1,)
        return (
            Part("weight", "F8_E4M3", (rows, cols)),
            Part(self.scale_name, self.scale_dtype, scale, every, values="nonnegative"),
            *self.unused,
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        from kconvert.formats.kernels import fp8 as kernels

        block_rows, block_cols = self.block_shape(*tile.shape)
        scale = _widen(parts[1], self.scale_dtype).reshape(self._grid(*tile.shape))
        if kernels.decode_fp8(parts[0].reshape(tile.shape), scale, block_rows, block_cols, tile):
            raise ValueError("it has a scale of zero over codes that are not zero")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        from kconvert.formats.kernels import fp8 as kernels

        if self.strategy == "tensor" or self.scale_dtype not in WRITTEN_SCALES:
            raise NotImplementedError(f"{self.label} with an {self.scale_dtype} scale is read, not written")
        block_rows, block_cols = self.block_shape(*tile.shape)
        rounded = self.scale_dtype == "BF16"
        blocks = self._grid(*tile.shape)
        scale = np.empty(blocks, np.float32) if rounded else parts[1].view("f4").reshape(blocks)
        codes = parts[0].reshape(tile.shape)
        if kernels.encode_fp8(tile, block_rows, block_cols, rounded, self.mse, codes, scale):
            raise ValueError("it has a value that is not finite")
        if rounded:
            parts[1].view("u2")[:] = scale.reshape(-1).view("u4") >> 16
        return 0

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


def _widen(scale: Bytes, dtype: str) -> Tile:
    """The bytes of scales -> f32, exact, aligned."""
    import numpy as np

    values = scale.view(SCALE_DTYPES[dtype])
    if dtype == "BF16":
        return (values.astype("u4") << 16).view("f4")
    if dtype in E8M0:
        powers: Tile = np.ldexp(np.ones(len(values), "f4"), values.astype("i4") - 127)
        return powers
    return values.astype("f4")


def from_scheme(scheme: Scheme) -> Fp8 | None:
    """See formats.base.Family."""
    if (scheme.format, scheme.type) not in KINDS or scheme.num_bits != 8 or not scheme.symmetric:
        return None
    if scheme.strategy == "block" and scheme.block is not None:
        if scheme.format == "fp8":
            return Fp8("block", scheme.block)
        return Fp8("block", scheme.block, "weight_scale", "BF16")
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
