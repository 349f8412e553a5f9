"""Eight-bit floats: e4m3 codes and a scale for each block, row (channel) or weight (tensor).

| tensor | dtype, shape |
|---|---|
| weight | F8_E4M3 [out, in]; 4 exponent bits, 3 mantissa bits, no Inf, largest value 448 |
| block scale | [ceil(out / 128), ceil(in / 128)]; edge blocks may be short |
| channel scale | [out, 1] or [out] |
| tensor scale | [1] or [] |
| input_scale | [1] or []; static activations only: read past, it says nothing about the weight |

DeepSeek-V3's layout calls its F32 block scale `weight_scale_inv` (the scale all the same, nothing is inverted);
compressed-tensors' `float-quantized` calls a scale of any shape `weight_scale`, BF16 or F32 (F16 in old files).

Value of a weight: bf16(f32(code) * f32(scale)), whatever the scale's dtype.
Quantising: scale = amax / 448, 1 where that is 0; code = e4m3(value / scale), an f32 division, half to even, saturating. A
BF16 scale is rounded first and the codes belong to the rounded scale.
Sources: https://github.com/deepseek-ai/DeepSeek-V3 `inference/fp8_cast_bf16.py`;
https://github.com/vllm-project/compressed-tensors `compressors/naive_quantized`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import Part

if TYPE_CHECKING:
    from kconvert.dialects.base import Scheme
    from kconvert.formats.base import Bytes, Tile

SCALES = ("weight_scale_inv", "weight_scale")
SUFFIXES = frozenset({"weight", "input_scale", *SCALES})
SCALE_DTYPES = {"F32": "f4", "BF16": "u2", "F16": "f2"}
STRATEGIES = ("block", "channel", "tensor")
# DeepSeek's quant_method, and what compressed-tensors calls the same encoding
SCHEME_FORMATS = ("fp8", "float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Fp8:
    """`strategy` is one of STRATEGIES, `block` counts for `block` only, `scale_name` is one of SCALES.

    `flat`: a channel scale is [out] and a tensor scale []. `input_scale`: dtype and shape of that tensor where there is one.
    Written are block and channel scales, F32 or BF16. `mse`: of a few scales the one with the least squared error
    (conventions.FP8_DIVISORS); no part of the encoding.
    """

    strategy: str = "block"
    block: tuple[int, int] = (128, 128)
    scale_name: str = "weight_scale_inv"
    scale_dtype: str = "F32"
    flat: bool = False
    input_scale: tuple[str, tuple[int, ...]] | None = None
    mse: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        return "fp8 block {}x{}".format(*self.block) if self.strategy == "block" else f"fp8 {self.strategy}"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        shape, every = self._scale(rows, cols)
        weight = Part("weight", "F8_E4M3", (rows, cols))
        scale = Part(self.scale_name, self.scale_dtype, shape, every, values="positive")
        if self.input_scale is None:
            return weight, scale
        dtype, shape = self.input_scale
        return weight, scale, Part("input_scale", dtype, shape, every=None, values="positive")

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        from kconvert.formats.kernels import fp8 as kernels

        block_rows, block_cols = self.block_shape(*tile.shape)
        scale = _widen(parts[1], self.scale_dtype).reshape(-1, math.ceil(tile.shape[1] / block_cols))
        kernels.decode_fp8(parts[0].reshape(tile.shape), scale, block_rows, block_cols, tile)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        from kconvert.formats.kernels import fp8 as kernels

        if self.strategy == "tensor" or self.scale_dtype == "F16":
            raise NotImplementedError(f"{self.label} with an {self.scale_dtype} scale is read, not written")
        block_rows, block_cols = self.block_shape(*tile.shape)
        rounded = self.scale_dtype == "BF16"
        blocks = math.ceil(tile.shape[0] / block_rows), math.ceil(tile.shape[1] / block_cols)
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

    def _scale(self, rows: int, cols: int) -> tuple[tuple[int, ...], int | None]:
        """Shape of the scale, and how many rows share a slice of it."""
        if self.strategy == "block":
            return (math.ceil(rows / self.block[0]), math.ceil(cols / self.block[1])), self.block[0]
        if self.strategy == "channel":
            return (rows,) if self.flat else (rows, 1), 1
        return () if self.flat else (1,), None


def _widen(scale: Bytes, dtype: str) -> Tile:
    """The bytes of scales -> f32, exact, aligned."""
    values = scale.view(SCALE_DTYPES[dtype])
    return (values.astype("u4") << 16).view("f4") if dtype == "BF16" else values.astype("f4")


def from_scheme(scheme: Scheme) -> Fp8 | None:
    """See formats.base.Family."""
    if scheme.format not in SCHEME_FORMATS or scheme.type != "float" or scheme.num_bits != 8 or not scheme.symmetric:
        return None
    if scheme.strategy == "block" and scheme.block is not None:
        if scheme.format == "fp8":
            return Fp8("block", scheme.block)
        return Fp8("block", scheme.block, "weight_scale", "BF16")
    if scheme.strategy in ("channel", "tensor"):
        return Fp8(scheme.strategy, scale_name="weight_scale", scale_dtype="BF16")
    return None


def recognise(
    scheme: Scheme | None, found: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int] | None
) -> tuple[Fp8, tuple[int, int]]:
    """See formats.base.Family."""
    if scheme is None:
        raise ValueError("config.json declares no quantisation for it")
    format = from_scheme(scheme)
    if format is None:
        raise ValueError(f"its scheme {scheme} is not supported; supported: FP8 block, channel and tensor, symmetric")
    for suffix in ("weight", format.scale_name):
        if suffix not in found:
            raise ValueError(f"it has no {suffix}")
    if surplus := found.keys() - {"weight", format.scale_name, "input_scale"}:
        raise ValueError(f"it has both {format.scale_name} and {surplus.pop()}")
    dtype, own_shape = found["weight"]
    if dtype != "F8_E4M3" or len(own_shape) != 2:
        raise ValueError(f"its weight is {dtype} {list(own_shape)}, not an F8_E4M3 matrix")
    scale_dtype, scale_shape = found[format.scale_name]
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"its {format.scale_name} is {scale_dtype}, not one of {', '.join(SCALE_DTYPES)}")
    input_scale = found.get("input_scale")
    if input_scale is not None and (input_scale[0] not in SCALE_DTYPES or input_scale[1] not in ((), (1,))):
        raise ValueError(f"its input_scale is {input_scale[0]} {list(input_scale[1])}, not one number")
    flat = format.strategy != "block" and len(scale_shape) == (1 if format.strategy == "channel" else 0)
    format = replace(format, scale_dtype=scale_dtype, flat=flat, input_scale=input_scale)
    return format, shape or (own_shape[0], own_shape[1])
