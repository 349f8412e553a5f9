"""compressed-tensors `int-quantized`: integers of four to eight bits, unpacked: one a byte; ModelOpt's INT4: two rows a byte.

| tensor | dtype, shape |
|---|---|
| weight | I8 [out, in]; ModelOpt's INT4: U8 [out / 2, in], of each two rows the first in the low nibble, two's complements |
| weight_scale | BF16, F16 or F32; channel [out, 1] or [out], tensor [1], [] or [1, 1], group [out, in / group] |
| weight_zero_point | asymmetric: I8, the scale's shape; zeros beside symmetric codes in old files |

Value of a weight: (code - zero point) * scale, rounded once to the scale's dtype. A scale may be negative, where the code of
the largest value is to be -128, and a scale of zero has codes that are the zero point.
Quantising (channel, symmetric, bf16 scales): compressed-tensors' rule, see CHANNEL_RULE: scale = bf16(amax / 127.5), 2^-7 where
that is zero; code = the quotient value / scale rounded to bf16, then half to even, clamped to [-128, 127].
Sources: https://github.com/vllm-project/compressed-tensors, `compressors/naive_quantized`;
https://github.com/NVIDIA/Model-Optimizer, `export/quant_utils.py` (`pack_int4_in_uint8`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.errors import Damaged
from kconvert.formats.base import ZERO_POINT, Format, Part, refuse_surplus, require, scaled_by, unused_zero_points
from kconvert.formats.conventions import Convention
from kconvert.formats.kernels import Kernels
from kconvert.formats.packed import SCALE_CODES

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

SUFFIXES = frozenset({"weight", "weight_scale", ZERO_POINT})
PAIRED = "modelopt-int4"
KINDS = frozenset((format, "int") for format in ("int-quantized", "naive-quantized", PAIRED))
READS = "integers of four to eight bits by channel, tensor and group"
kernels = Kernels("int8")
BITS = range(4, 9)
STRATEGIES = ("channel", "tensor", "group")
CHANNEL_RULE = Convention("compressed-tensors", 127.5, -128, 127, rounds=True, zero_scale=2.0**-7)


@dataclass(frozen=True, slots=True)
class Int8(Format):
    """`strategy` is one of STRATEGIES, `bits` one of BITS. `unused`: zero points that lie beside symmetric codes.

    `paired`: ModelOpt's INT4, two rows to a byte.
    """

    strategy: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "BF16"
    bits: int = 8
    unused: tuple[Part, ...] = ()
    paired: bool = False

    @property
    def label(self) -> str:
        size = f" {self.group_size}" if self.group_size else ""
        unpacked = "" if self.bits == 8 else " paired" if self.paired else " unpacked"
        return f"int{self.bits}{unpacked} {self.strategy}{size}" + ("" if self.symmetric else " asymmetric")

    @property
    def value_dtype(self) -> str:
        """Integers are multiplied in their scale's dtype."""
        return self.scale_dtype

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if self.group_size and cols % self.group_size:
            raise ValueError(f"its {cols} columns do not divide into groups of {self.group_size}")
        every = None if self.strategy == "tensor" else 1
        shape = (1,) if every is None else (rows, cols // self.group_size if self.group_size else 1)
        zero = () if self.symmetric else (Part(ZERO_POINT, "I8", shape, every),)
        if self.paired and rows % 2:
            raise ValueError(f"its {rows} rows are no pairs")
        codes = Part("weight", "U8", (rows // 2, cols), every=2) if self.paired else Part("weight", "I8", (rows, cols))
        return (
            codes,
            Part("weight_scale", self.scale_dtype, shape, every, values="finite"),
            *zero,
            *self.unused,
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        rows, cols = (1, tile.size) if self.strategy == "tensor" else tile.shape
        groups = cols // self.group_size if self.group_size else 1
        shape = (rows, groups, cols // max(groups, 1))
        scale = parts[1].view(SCALE_CODES[self.scale_dtype]).reshape(rows, groups)
        zero = None if self.symmetric else parts[2].view("i1").reshape(rows, groups)
        if self.paired:
            senseless = kernels.decode_pairs(parts[0].reshape(rows // 2, *shape[1:]), scale, tile.reshape(shape))
        else:
            senseless = kernels.decode_int8(parts[0].view("i1").reshape(shape), scale, zero, tile.reshape(shape))
        if senseless:
            raise Damaged("it has a scale of zero over codes that are not zero")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        if (self.bits, self.strategy, self.symmetric, self.scale_dtype) != (8, "channel", True, "BF16"):
            raise NotImplementedError(f"{self.label} with an {self.scale_dtype} scale is read, not written")
        divisor = tile.dtype.type(CHANNEL_RULE.divisor)
        codes = parts[0].view("i1").reshape(tile.shape)
        if kernels.encode_int8(tile, divisor, CHANNEL_RULE.zero_bits, codes, parts[1].view("u2")):
            raise Damaged("it has a value that is not finite")
        return 0


def from_scheme(scheme: Scheme) -> Int8 | None:
    """See formats.base.Family."""
    if (scheme.format, scheme.type) not in KINDS or scheme.num_bits not in BITS or scheme.strategy not in STRATEGIES:
        return None
    if scheme.format == PAIRED:
        is_read = (scheme.strategy, scheme.num_bits, scheme.symmetric) == ("group", 4, True)
        return Int8("group", scheme.group_size, bits=4, paired=True) if is_read else None
    return Int8(scheme.strategy, scheme.group_size, scheme.symmetric, bits=scheme.num_bits)


def recognise(declared: Int8, found: Found, shape: tuple[int, int] | None) -> tuple[Int8, tuple[int, int]]:
    """See formats.base.Family."""
    require(found, "weight", "weight_scale", *(() if declared.symmetric else (ZERO_POINT,)))
    refuse_surplus(found, SUFFIXES)
    dtype, own_shape = found["weight"]
    wanted = "U8" if declared.paired else "I8"
    if dtype != wanted or len(own_shape) != 2:
        raise ValueError(f"its weight is {dtype} {list(own_shape)}, not an {wanted} matrix")
    own_shape = (2 * own_shape[0], own_shape[1]) if declared.paired else own_shape
    scale_dtype, scale_shape = found["weight_scale"]
    if scale_dtype not in SCALE_CODES:
        raise ValueError(f"its weight_scale is {scale_dtype}, not BF16, F16 or F32")
    strategy = declared.strategy
    if strategy != "group":
        strategy = scaled_by(strategy, own_shape[0], scale_shape)
    unused = unused_zero_points(found, own_shape[0]) if declared.symmetric else ()
    format = replace(declared, strategy=strategy, scale_dtype=scale_dtype, unused=unused)
    return format, shape or (own_shape[0], own_shape[1])
