"""NVFP4: e2m1 codes, 16 to an e4m3 scale, and one scale for the weight, which divides or multiplies.

| tensor | compressed-tensors | ModelOpt | dtype, shape |
|---|---|---|---|
| codes | weight_packed | weight | U8 [out, in / 2]; e2m1 (see formats.mx), the first column in the low nibble |
| scale | weight_scale | weight_scale | F8_E4M3 [out, in / 16] |
| global scale | weight_global_scale | weight_scale_2 | F32 [1], [] or [1, 1] |
| of activations | input_global_scale | input_scale | F32 [1], []; one is 1 / the other; 1 where nobody has measured |

Value of a weight: bf16(code * step), the product rounded to f32, and so is step: f32(scale) / global scale in
compressed-tensors' `nvfp4-pack-quantized`, f32(scale) * global scale in ModelOpt's NVFP4. The names tell which it is.
Code 8 is -0, as in hardware; ModelOpt's dequantiser has 0 there.

Quantising: the global factor is a power of two, 2^(e - 10) where 2^e is that in the largest magnitude of the weight and of
those that engines fuse with it (or in a bound of that by their scales: see Format.reach); so its inverse is exact, and both
spellings have the same values. scale = e4m3(amax / (6 * factor)), half to even, 2^-9 at least; code = e2m1(value / step), an
f32 division, half to even, saturating. `mse`: of that scale and a few of e4m3 around it the one with the least squared error.
Where they come from such encodings, groups that codes and a scale reproduce get these, with the sign of zeros, and the others
are counted. MXFP4 keeps its codes: each of its scales, less the factor, is there twice, while e4m3 has it (2^-9 to 2^8: the
weight's largest may be 2^17 times as large); groups beyond are quantised anew. From one spelling to the other codes and scales
stay, the global scale and that of activations become 1 / themselves; groups are counted whose values are not the same by it.
Sources: https://github.com/vllm-project/compressed-tensors, `compressors/nvfp4`;
https://github.com/NVIDIA/Model-Optimizer, `quantization/qtensor/nvfp4_tensor.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
from kconvert.formats.kernels import Kernels
from kconvert.formats.mx import GROUP as MX_GROUP
from kconvert.formats.mx import Mx

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile
    from kconvert.formats.conventions import Convention

kernels = Kernels("nvfp4")
GROUP = 16
# Codes and global scale, by whether that multiplies.
NAMES = {False: ("weight_packed", "weight_global_scale"), True: ("weight", "weight_scale_2")}
INPUTS = {False: "input_global_scale", True: "input_scale"}
SUFFIXES = frozenset({"weight_scale", *NAMES[False], *NAMES[True], ZERO_POINT})
FORMATS = {"nvfp4-pack-quantized": False, "nvfp4": True}
KINDS = frozenset((format, "float") for format in FORMATS)
READS = "NVFP4, group 16"
ONE = struct.pack("<f", 1.0)
HEADROOM = 10  # the largest magnitude is 2^10 to 2^11 times the global factor: up to 6 times a scale of 341
EXTREME = 126  # powers of two to this one either way are normal floats, and so are their inverses


@dataclass(frozen=True, slots=True)
class Nvfp4(Format):
    """`multiplies`: ModelOpt's names and global scale. `unused`: zero points that lie beside it.

    `inputs`: activations are quantised, too, by a scale beside it; in ModelOpt's dialect, whose engines want one, it is 1 where
    nobody has measured any. `measured`: it comes from the source, where its inverse lies beside the weight.

    How values become codes is no part of the encoding: `mse`: of a few scales the one with the least squared error; `exact`:
    groups that do not come back are counted; `strict`: they are an error.
    """

    multiplies: bool = False
    unused: tuple[Part, ...] = ()
    inputs: bool = False
    measured: bool = False
    mse: bool = field(default=False, compare=False)
    exact: bool = field(default=False, compare=False)
    strict: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        return "nvfp4"

    def by_rule(self, convention: Convention, group_size: int, strict: bool) -> Nvfp4:
        return replace(self, strict=strict)

    def scaled(self, mse: bool) -> Nvfp4:
        return replace(self, mse=mse)

    @property
    def compares_scales(self) -> bool:
        return self.mse

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        """What is spelt so already stays, with what lies beside it."""
        check_groups(cols, GROUP)
        has_codes = isinstance(source, Nvfp4) or self.takes_codes(source)
        exact = has_codes or ((self.strict or source.may_have_powers) and not mse)
        format = replace(self, mse=mse and not exact, exact=exact)
        if isinstance(source, Nvfp4) and source.multiplies == self.multiplies:
            return replace(format, inputs=source.inputs)
        return Format.fit(format, source, rows, cols, mse)

    def fate(self, source: Format) -> Fate:
        if isinstance(source, Nvfp4) and source.multiplies == self.multiplies:
            return "lossless"
        return "recovered" if self.exact else "lossy"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % GROUP:
            raise ValueError(f"its {cols} columns do not divide into groups of {GROUP}")
        codes, global_scale = NAMES[self.multiplies]
        return (
            Part(codes, "U8", (rows, cols // 2)),
            Part("weight_scale", "F8_E4M3", (rows, cols // GROUP), values="nonnegative"),
            Part(global_scale, "F32", (1,), every=None, values="positive"),
            *self._inputs,
            *self.unused,
        )

    @property
    def _inputs(self) -> tuple[Part, ...]:
        if self.measured:
            return (Part(INPUTS[self.multiplies], "F32", () if self.multiplies else (1,), every=None),)
        unknown = self.inputs and self.multiplies
        return (Part(INPUTS[True], "F32", (), every=None, constant=ONE),) if unknown else ()

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        global_scale = parts[2].view("f4")[0]
        kernels.decode_nvfp4(parts[0], parts[1], global_scale, self.multiplies, tile.reshape(-1))

    def settles(self, source: Format) -> bool:
        return not isinstance(source, Nvfp4)

    def settle(self, reach: float, parts: Sequence[Bytes]) -> None:
        _, exponent = math.frexp(reach)
        power = min(max(exponent - 1 - HEADROOM if reach else 0, -EXTREME), EXTREME)
        parts[2].view("f4")[0] = 2.0 ** (power if self.multiplies else -power)

    def _factor(self, parts: Sequence[Bytes]) -> Tile:
        """The global factor, one f32."""
        import numpy as np

        stored = parts[2].view("f4")[0]
        return stored if self.multiplies else np.float32(1) / stored  # type: ignore[no-any-return]

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        groups, codes = tile.reshape(-1, GROUP), parts[0].reshape(-1, GROUP // 2)
        lost = kernels.encode_nvfp4(groups, self._factor(parts), self.exact, self.mse, codes, parts[1])
        if lost < 0:
            raise Damaged("it has a value that is not finite")
        return self._counted(lost)

    def takes_codes(self, source: Format) -> bool:
        return isinstance(source, Nvfp4) or (isinstance(source, Mx) and source.bits == 4)

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        if isinstance(source, Nvfp4):
            return self._respell(source, inputs, parts)
        codes, packed = (side[0].reshape(-1, MX_GROUP // 2) for side in (inputs, parts))
        packed[:] = codes
        lost = kernels.encode_mxfp4(codes, inputs[1], self._factor(parts), packed, parts[1].reshape(-1, 2))
        if lost < 0:
            raise Damaged("it has a value that is not finite")
        return self._counted(lost)

    def _respell(self, source: Nvfp4, inputs: Sequence[Bytes], parts: Sequence[Bytes]) -> int:
        """The same codes and scales, and 1 / global scale; how many groups have other values by that."""
        for k in range(2):
            parts[k][:] = inputs[k]
        before = inputs[2].view("f4")[0]
        parts[2].view("f4")[0] = after = inverse_of(before)
        if self.measured:
            self._invert_inputs(inputs[3], parts[3])
        return self._counted(lost_by(parts[0], parts[1], (before, source.multiplies), (after, self.multiplies)))

    def _invert_inputs(self, given: Bytes, made: Bytes) -> None:
        """1 / the scale of activations; 1 where it is 0, Inf or without one, as beside an expert that no token reached."""
        import numpy as np

        scale, inverse = given.view("f4"), made.view("f4")
        with np.errstate(all="ignore"):
            inverse[0] = np.float32(1) / scale[0]
            if not scale[0] >= 0:
                raise ValueError(f"its {INPUTS[not self.multiplies]} {scale[0]:.9g} is no scale of activations")
            if not 0 < inverse[0] < math.inf:
                inverse[0] = 1
            if self.strict and np.float32(1) / inverse[0] != scale[0]:
                raise Unfit(
                    f"its {INPUTS[not self.multiplies]} {scale[0]:.9g} does not come back from 1 / itself in F32,",
                    "leave out --require-exact",
                )

    def stand_ins(self, inputs: Sequence[Bytes], parts: Sequence[Bytes]) -> tuple[Part, ...]:
        import numpy as np

        if not self.measured:
            return ()
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / inputs[3].view("f4")[0]
        return () if inverse == parts[3].view("f4")[0] else self._inputs

    def _counted(self, lost: int) -> int:
        if lost and self.strict:
            raise Unfit(f"{some_have(lost, 'groups')} values that no codes and scales reproduce", ROUNDED)
        return lost if self.exact else 0


def lost_by(codes: Bytes, scale: Bytes, *factors: tuple[Tile, bool]) -> int:
    """How many groups have other values by the second of two global scales than by the first, which each multiplies or not."""
    import numpy as np

    steps = np.empty((2, 256), np.float32)
    for made, factor in zip(steps, factors, strict=True):
        kernels.steps_of(*factor, made)
    return kernels.count_changed(codes.reshape(-1, GROUP // 2), scale, *steps)


def inverse_of(global_scale: Tile) -> Tile:
    """1 / a global scale in F32."""
    import numpy as np

    with np.errstate(over="ignore", divide="ignore"):
        found: Tile = np.float32(1) / global_scale
    if not 0 < found < math.inf:
        raise ValueError(f"its global scale {global_scale} has no inverse that an F32 can hold")
    return found


def with_measured(source: Nvfp4, target: Nvfp4) -> tuple[Nvfp4, Nvfp4]:
    """Both with the scale of activations, which one dialect has as the inverse of the other's."""
    return _with_measured(source, target, (target.mse, target.exact, target.strict))


@lru_cache
def _with_measured(source: Nvfp4, target: Nvfp4, rules: tuple[bool, ...]) -> tuple[Nvfp4, Nvfp4]:
    """Shared by weights; formats are equal whose `rules` differ."""
    return replace(source, measured=True), replace(target, measured=True)


def from_scheme(scheme: Scheme) -> Nvfp4 | None:
    """See formats.base.Family."""
    if scheme.format not in FORMATS or (scheme.num_bits, scheme.type) != (4, "float"):
        return None
    return Nvfp4(FORMATS[scheme.format]) if scheme.symmetric and scheme.group_size in (None, GROUP) else None


def recognise(declared: Nvfp4, found: Found, shape: tuple[int, int] | None) -> tuple[Nvfp4, tuple[int, int]]:
    """See formats.base.Family."""
    multiplies = NAMES[True][1] in found or (declared.multiplies and NAMES[False][1] not in found)
    codes, global_scale = NAMES[multiplies]
    require(found, codes, "weight_scale", global_scale)
    refuse_surplus(found, {codes, "weight_scale", global_scale, ZERO_POINT})
    packed = found[codes][1]
    if len(packed) != 2:
        raise ValueError(f"its {codes} {list(packed)} is not a matrix")
    format = Nvfp4(multiplies, unused_zero_points(found, packed[0]))
    return format, shape or (packed[0], packed[1] * 2)
