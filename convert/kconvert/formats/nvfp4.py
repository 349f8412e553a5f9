"""NVFP4: e2m1 codes, 16 to an e4m3 scale, and one scale for the weight, which divides or multiplies. Decoded only.

| tensor | compressed-tensors | ModelOpt | dtype, shape |
|---|---|---|---|
| codes | weight_packed | weight | U8 [out, in / 2]; e2m1 (see formats.mx), the first column in the low nibble |
| scale | weight_scale | weight_scale | F8_E4M3 [out, in / 16] |
| global scale | weight_global_scale | weight_scale_2 | F32 [1], [] or [1, 1] |

Value of a weight: bf16(code * step), the product rounded to f32, and so is step: f32(scale) / global scale in
compressed-tensors' `nvfp4-pack-quantized`, f32(scale) * global scale in ModelOpt's NVFP4. The names tell which it is.
Code 8 is -0, as in hardware; ModelOpt's dequantiser has 0 there.
Sources: https://github.com/vllm-project/compressed-tensors, `compressors/nvfp4`;
https://github.com/NVIDIA/Model-Optimizer, `quantization/qtensor/nvfp4_tensor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.formats.base import ZERO_POINT, Format, Part, refuse_surplus, require, unused_zero_points

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

GROUP = 16
# Codes and global scale, by whether that multiplies.
NAMES = {False: ("weight_packed", "weight_global_scale"), True: ("weight", "weight_scale_2")}
SUFFIXES = frozenset({"weight_scale", *NAMES[False], *NAMES[True], ZERO_POINT})
FORMATS = {"nvfp4-pack-quantized": False, "nvfp4": True}
KINDS = frozenset((format, "float") for format in FORMATS)
READS = "NVFP4, group 16"


@dataclass(frozen=True, slots=True)
class Nvfp4(Format):
    """`multiplies`: ModelOpt's names and global scale. `unused`: zero points that lie beside it."""

    multiplies: bool = False
    unused: tuple[Part, ...] = ()

    @property
    def label(self) -> str:
        return "nvfp4"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % GROUP:
            raise ValueError(f"its {cols} columns do not divide into groups of {GROUP}")
        codes, global_scale = NAMES[self.multiplies]
        return (
            Part(codes, "U8", (rows, cols // 2)),
            Part("weight_scale", "F8_E4M3", (rows, cols // GROUP), values="nonnegative"),
            Part(global_scale, "F32", (1,), every=None, values="positive"),
            *self.unused,
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        from kconvert.formats.kernels import mx as kernels

        global_scale = parts[2].view("f4")[0]
        kernels.decode_nvfp4(parts[0], parts[1], global_scale, self.multiplies, tile.reshape(-1))

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        raise NotImplementedError("nvfp4 is read, not written")


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
    format = replace(declared, multiplies=multiplies, unused=unused_zero_points(found, packed[0]))
    return format, shape or (packed[0], packed[1] * 2)
