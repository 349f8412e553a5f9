"""compressed-tensors `nvfp4-pack-quantized`: e2m1 codes, 16 to an e4m3 scale, and one scale for the weight. Decoded only.

| tensor | dtype, shape |
|---|---|
| weight_packed | U8 [out, in / 2]; e2m1 codes (see formats.mx), the first column in the low nibble |
| weight_scale | F8_E4M3 [out, in / 16] |
| weight_global_scale | F32 [1], [] or [1, 1]: by this the scales were multiplied |

Value of a weight: bf16(code * (f32(scale) / global scale)), the quotient and the product rounded to f32.
Source: https://github.com/vllm-project/compressed-tensors, `compressors/nvfp4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kconvert.formats.base import ZERO_POINT, Format, Part, refuse_surplus, require, unused_zero_points

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

GROUP = 16
SUFFIXES = frozenset({"weight_packed", "weight_scale", "weight_global_scale", ZERO_POINT})
KINDS = frozenset({("nvfp4-pack-quantized", "float")})
READS = "NVFP4, group 16"


@dataclass(frozen=True, slots=True)
class Nvfp4(Format):
    """`unused`: zero points that lie beside it."""

    unused: tuple[Part, ...] = ()

    @property
    def label(self) -> str:
        return "nvfp4"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % GROUP:
            raise ValueError(f"its {cols} columns do not divide into groups of {GROUP}")
        return (
            Part("weight_packed", "U8", (rows, cols // 2)),
            Part("weight_scale", "F8_E4M3", (rows, cols // GROUP), values="nonnegative"),
            Part("weight_global_scale", "F32", (1,), every=None, values="positive"),
            *self.unused,
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        from kconvert.formats.kernels import mx as kernels

        global_scale = parts[2].view("f4")[0]
        kernels.decode_nvfp4(parts[0].reshape(-1, GROUP // 2), parts[1], global_scale, tile.reshape(-1, GROUP))

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        raise NotImplementedError("nvfp4 is read, not written")


def from_scheme(scheme: Scheme) -> Nvfp4 | None:
    """See formats.base.Family."""
    if (scheme.format, scheme.num_bits, scheme.type) != ("nvfp4-pack-quantized", 4, "float"):
        return None
    return Nvfp4() if scheme.symmetric else None


def recognise(declared: Nvfp4, found: Found, shape: tuple[int, int] | None) -> tuple[Nvfp4, tuple[int, int]]:
    """See formats.base.Family."""
    require(found, "weight_packed", "weight_scale", "weight_global_scale")
    refuse_surplus(found, SUFFIXES)
    packed = found["weight_packed"][1]
    if len(packed) != 2:
        raise ValueError(f"its weight_packed {list(packed)} is not a matrix")
    return Nvfp4(unused_zero_points(found, packed[0])), shape or (packed[0], packed[1] * 2)
