"""compressed-tensors `int-quantized`: eight-bit integers, unpacked.

| tensor | dtype, shape |
|---|---|
| weight | I8 [out, in] |
| weight_scale | BF16, F16 or F32; channel [out, 1] or [out], tensor [1] or [], group [out, in / group] |
| weight_zero_point | asymmetric only: I8, the scale's shape |
| input_scale and its like | static activations only: read past, they say nothing about the weight |

Value of a weight: (code - zero point) * scale, rounded once to the scale's dtype.
Quantising (channel, symmetric, bf16 scales): compressed-tensors' rule, see CHANNEL_RULE: scale = bf16(amax / 127.5), 2^-7 where
that is zero; code = the quotient value / scale rounded to bf16, then half to even, clamped to [-128, 127].
Source: https://github.com/vllm-project/compressed-tensors, `compressors/naive_quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import Part
from kconvert.formats.conventions import Convention
from kconvert.formats.packed import SCALE_CODES

if TYPE_CHECKING:
    from kconvert.dialects.base import Scheme
    from kconvert.formats.base import Bytes, Tile

ACTIVATIONS = frozenset({"input_scale", "input_zero_point", "output_scale", "output_zero_point"})
SUFFIXES = frozenset({"weight", "weight_scale", "weight_zero_point"}) | ACTIVATIONS
STRATEGIES = ("channel", "tensor", "group")
CHANNEL_RULE = Convention("compressed-tensors", 127.5, -128, 127, rounds=True, zero_scale=2.0**-7)


@dataclass(frozen=True, slots=True)
class Int8:
    """`strategy` is one of STRATEGIES. `flat`: a channel scale is [out] and a tensor scale [].

    `activations` are (suffix, dtype, shape) of tensors beside it that describe activations.
    """

    strategy: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "BF16"
    flat: bool = False
    activations: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    @property
    def label(self) -> str:
        size = f" {self.group_size}" if self.group_size else ""
        return f"int8 {self.strategy}{size}" + ("" if self.symmetric else " asymmetric")

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if self.group_size and cols % self.group_size:
            raise ValueError(f"its {cols} columns do not divide into groups of {self.group_size}")
        every = None if self.strategy == "tensor" else 1
        if self.strategy == "group":
            shape: tuple[int, ...] = (rows, cols // (self.group_size or cols))
        else:
            shape = (*(() if every is None else (rows,)), *(() if self.flat else (1,)))
        zero = () if self.symmetric else (Part("weight_zero_point", "I8", shape, every),)
        return (
            Part("weight", "I8", (rows, cols)),
            Part("weight_scale", self.scale_dtype, shape, every, values="nonnegative"),
            *zero,
            *(Part(suffix, dtype, shape, every=None) for suffix, dtype, shape in self.activations),
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        from kconvert.formats.kernels import int8 as kernels

        rows = 1 if self.strategy == "tensor" else len(tile)
        scale = parts[1].view(SCALE_CODES[self.scale_dtype]).reshape(rows, -1)
        shape = (*scale.shape, -1)
        zero = None if self.symmetric else parts[2].view("i1").reshape(scale.shape)
        kernels.decode_int8(parts[0].view("i1").reshape(shape), scale, zero, tile.reshape(shape))

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        from kconvert.formats.kernels import int8 as kernels

        if (self.strategy, self.symmetric, self.scale_dtype) != ("channel", True, "BF16"):
            raise NotImplementedError(f"{self.label} with an {self.scale_dtype} scale is read, not written")
        divisor = tile.dtype.type(CHANNEL_RULE.divisor)
        codes = parts[0].view("i1").reshape(tile.shape)
        if kernels.encode_int8(tile, divisor, CHANNEL_RULE.zero_bits, codes, parts[1].view("u2")):
            raise ValueError("it has a value that is not finite")
        return 0


def from_scheme(scheme: Scheme) -> Int8 | None:
    """See formats.base.Family."""
    if scheme.format not in ("int-quantized", "naive-quantized") or scheme.type != "int" or scheme.num_bits != 8:
        return None
    if scheme.strategy not in STRATEGIES:
        return None
    return Int8(scheme.strategy, scheme.group_size, scheme.symmetric)


def recognise(
    scheme: Scheme | None, found: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int] | None
) -> tuple[Int8, tuple[int, int]]:
    """See formats.base.Family."""
    if scheme is None:
        raise ValueError("config.json declares no quantisation for it")
    format = from_scheme(scheme)
    if format is None:
        raise ValueError(f"its scheme {scheme} is not supported; supported: int8 channel, tensor and group")
    for suffix in ("weight", "weight_scale", *(() if format.symmetric else ("weight_zero_point",))):
        if suffix not in found:
            raise ValueError(f"it has no {suffix}")
    if format.symmetric and "weight_zero_point" in found:
        raise ValueError("it has a weight_zero_point, but its scheme is symmetric")
    dtype, own_shape = found["weight"]
    if dtype != "I8" or len(own_shape) != 2:
        raise ValueError(f"its weight is {dtype} {list(own_shape)}, not an I8 matrix")
    shape = shape or (own_shape[0], own_shape[1])
    scale_dtype, scale_shape = found["weight_scale"]
    if scale_dtype not in SCALE_CODES:
        raise ValueError(f"its weight_scale is {scale_dtype}, not BF16, F16 or F32")
    flat = format.strategy != "group" and len(scale_shape) == (1 if format.strategy == "channel" else 0)
    activations = tuple((suffix, *found[suffix]) for suffix in sorted(ACTIVATIONS & found.keys()))
    return replace(format, scale_dtype=scale_dtype, flat=flat, activations=activations), shape
