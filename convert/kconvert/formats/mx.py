"""Microscaling floats of the Open Compute Project (OCP MX 1.0): 32 columns share a scale that is a power of two.

| format | tensor | dtype, shape |
|---|---|---|
| mxfp4 (`mxfp4-pack-quantized`) | weight_packed | U8 [out, in / 2]; e2m1 codes, the first column in the low nibble |
| mxfp8 (`mxfp8-quantized`) | weight | F8_E4M3 [out, in] |
| both | weight_scale | U8 or F8_E8M0 [out, in / 32]; the exponent + 127 |

Others call the codes of mxfp4 `weight`, U8 (Quark) or I8 (DeepSeek-V4), and the scale `scale` (DeepSeek-V4) or
`weight_scale_inv` (MiniMax-M3). MLX has the codes of both in words, `weight` U32, and `scales`.

e2m1 spells 0, 0.5, 1, 1.5, 2, 3, 4, 6 and, with bit 3, their negatives. Value of a weight: bf16(code * 2^(scale - 127)).
Quantising: the exponent of amax, rounded up from a mantissa of 1.75 (which would saturate otherwise), less that of the
largest code (2 or 8); code = value / scale, half to even, saturating. MX 1.0 always rounds the exponent down; this is
compressed-tensors' `generate_mx_scales`. A negative value that rounds to zero is -0, and -0 itself is +0 in e2m1.
Values that are codes times a power of two come back under that scale, whichever it was: a smaller one only makes codes larger.
Two things are done otherwise for their sake, in groups that come back altogether: -0 stays -0, and amax may be 448 in MXFP8.
MXFP4 always comes back, in MXFP8 too.
Sources: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf;
https://github.com/vllm-project/compressed-tensors, `compressors/mxfp4`, `compressors/mxfp8`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kconvert.errors import Damaged, Unfit, some_have
from kconvert.formats.base import (
    ROUNDED,
    ZERO_POINT,
    Fate,
    Format,
    Part,
    check_groups,
    refuse_surplus,
    require,
    unused_zero_points,
)
from kconvert.formats.fp8 import has_nan
from kconvert.formats.kernels import Kernels

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile
    from kconvert.formats.conventions import Convention

kernels = Kernels("mx")
GROUP = 32
CODES = {4: ("weight_packed", "U8"), 8: ("weight", "F8_E4M3")}  # name and dtype where nobody says otherwise
CODES_NAMES = {4: ("weight_packed", "weight"), 8: ("weight",)}
CODES_DTYPES = {4: ("U8", "I8"), 8: ("F8_E4M3",)}
WORDS = "U32"  # in which MLX has the codes of both
SCALES = ("weight_scale", "weight_scale_inv", "scale")
SUFFIXES = frozenset({"weight_packed", "weight", *SCALES, ZERO_POINT})
READS = "MXFP4 and MXFP8, group 32"
LARGEST = {4: 6.0, 8: 448.0}
SPREAD = 17  # of powers of two in E4M3: 2^-9 to 2^8


@dataclass(frozen=True, slots=True)
class Mx(Format):
    """`bits` is 4 or 8. `unused`: zero points that lie beside it.

    `codes_name`, `codes_dtype` and `scale_name` say how its tensors are called; the codes of no other name have CODES'.

    How values become codes is no part of the encoding: `mse`: of the scale by the rule, half of it and twice, the one with the
    least squared error; `exact`: groups that do not come back are counted; `strict`: they are an error.
    """

    bits: int
    scale_dtype: str = "U8"
    unused: tuple[Part, ...] = ()
    codes_name: str = ""
    codes_dtype: str = ""
    scale_name: str = "weight_scale"
    mse: bool = field(default=False, compare=False)
    exact: bool = field(default=False, compare=False)
    strict: bool = field(default=False, compare=False)
    decodes_bf16 = True

    def __post_init__(self) -> None:
        name, dtype = CODES[self.bits]
        object.__setattr__(self, "codes_name", self.codes_name or name)
        object.__setattr__(self, "codes_dtype", self.codes_dtype or dtype)

    @property
    def label(self) -> str:
        return f"mxfp{self.bits}"

    @property
    def group_size(self) -> int:
        return GROUP

    @property
    def may_have_powers(self) -> bool:
        return True

    @property
    def usual(self) -> Mx:
        return Mx(self.bits)

    def by_rule(self, convention: Convention, group_size: int, strict: bool) -> Mx:
        return replace(self, strict=strict)

    def scaled(self, mse: bool) -> Mx:
        return replace(self, mse=mse)

    @property
    def compares_scales(self) -> bool:
        return self.mse

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        check_groups(cols, GROUP)
        mse = mse and not self._holds(source)
        exact = (self.strict or source.may_have_powers) and not mse
        return Format.fit(replace(self, mse=mse, exact=exact), source, rows, cols, mse)

    def fate(self, source: Format) -> Fate:
        return "lossless" if self._holds(source) else "recovered" if self.exact else "lossy"

    def _holds(self, source: Format) -> bool:
        """Whether it has every value of such a weight."""
        return isinstance(source, Mx) and source.bits <= self.bits

    def reach(self, read: Callable[..., Iterator[list[Bytes]]]) -> float | None:
        """By the largest scale. Beyond what E4M3 can follow only the values tell which groups are all zero."""
        import numpy as np

        found = np.zeros(256, np.bool_)
        for (scale,) in read(1):
            found[scale] = True
        exponents = np.flatnonzero(found[1:]) + 1  # the lowest is what a group of zeros has
        if not len(exponents):
            return None
        is_narrow = exponents[-1] - exponents[0] <= SPREAD or self.bits == 8
        return LARGEST[self.bits] * 2.0 ** (int(exponents[-1]) - 127) if is_narrow else None

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % GROUP:
            raise ValueError(f"its {cols} columns do not divide into groups of {GROUP}")
        in_row = cols * self.bits // (32 if self.codes_dtype == WORDS else 8)
        codes = Part(self.codes_name, self.codes_dtype, (rows, in_row))
        scale = Part(self.scale_name, self.scale_dtype, (rows, cols // GROUP), values="positive")
        return codes, scale, *self.unused

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        kernel = kernels.decode_mxfp4 if self.bits == 4 else kernels.decode_mxfp8
        kernel(parts[0].reshape(-1, GROUP * self.bits // 8), parts[1], tile.reshape(-1, GROUP))
        if self.bits == 8 and has_nan(parts[0]):
            raise Damaged("it has a code that is NaN")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        kernel = kernels.encode_mxfp4 if self.bits == 4 else kernels.encode_mxfp8
        groups, codes = tile.reshape(-1, GROUP), parts[0].reshape(-1, GROUP * self.bits // 8)
        if kernel(groups, self.mse, codes, parts[1]):
            raise Damaged("it has a value that is not finite")
        mend = kernels.mend_mxfp4 if self.bits == 4 else kernels.mend_mxfp8
        lost = mend(groups, codes, parts[1]) if self.exact else 0
        if lost and self.strict:
            raise Unfit(f"{some_have(lost, 'groups')} values that no codes and power of two reproduce", ROUNDED)
        return lost


# How those who declare it by this word spell it: compressed-tensors; Quark and ModelOpt; DeepSeek-V4's experts; MiniMax-M3.
FORMATS = {
    "mxfp4-pack-quantized": Mx(4),
    "mxfp8-quantized": Mx(8),
    "mxfp4": Mx(4, codes_name="weight"),
    "fp4": Mx(4, "F8_E8M0", codes_name="weight", codes_dtype="I8", scale_name="scale"),
    "mxfp8": Mx(8, scale_name="weight_scale_inv"),
}
KINDS = frozenset((format, "float") for format in FORMATS)


def from_scheme(scheme: Scheme) -> Mx | None:
    """See formats.base.Family."""
    format = FORMATS.get(scheme.format)
    if format is None or not scheme.symmetric:
        return None
    meant = (scheme.num_bits, scheme.type, scheme.strategy, scheme.group_size) == (format.bits, "float", "group", GROUP)
    return format if meant else None


def recognise(declared: Mx, found: Found, shape: tuple[int, int] | None) -> tuple[Mx, tuple[int, int]]:
    """See formats.base.Family."""
    names, scales = (declared.codes_name, *CODES_NAMES[declared.bits]), (declared.scale_name, *SCALES)
    codes = next((name for name in names if name in found), declared.codes_name)
    scale = next((name for name in scales if name in found), declared.scale_name)
    require(found, codes, scale)
    refuse_surplus(found, {codes, scale, ZERO_POINT})
    (dtype, own_shape), scale_dtype = found[codes], found[scale][0]
    if len(own_shape) != 2:
        raise ValueError(f"its {codes} {list(own_shape)} is not a matrix")
    if dtype not in CODES_DTYPES[declared.bits]:
        raise ValueError(f"its {codes} is {dtype}, not {' or '.join(CODES_DTYPES[declared.bits])}")
    if scale_dtype not in ("U8", "F8_E8M0"):
        raise ValueError(f"its {scale} is {scale_dtype}, not U8 or F8_E8M0")
    unused = unused_zero_points(found, own_shape[0])
    format = Mx(declared.bits, scale_dtype, unused, codes_name=codes, codes_dtype=dtype, scale_name=scale)
    return format, shape or (own_shape[0], own_shape[1] * 8 // declared.bits)
