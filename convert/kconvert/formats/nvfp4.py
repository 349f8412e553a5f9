"""compressed-tensors `nvfp4-pack-quantized`: e2m1 codes, 16 to an e4m3 scale, and one scale for the weight. Decoded only.

| tensor | dtype, shape |
|---|---|
| weight_packed | U8 [out, in / 2]; e2m1 codes (see formats.mx), the first column in the low nibble |
| weight_scale | F8_E4M3 [out, in / 16] |
| weight_global_scale | F32 [1] or []: by this the scales were multiplied |
| input_scale, input_global_scale | static activations only: read past, they say nothing about the weight |

Value of a weight: bf16(code * (f32(scale) / global scale)), the quotient and the product rounded to f32.
Source: https://github.com/vllm-project/compressed-tensors, `compressors/nvfp4`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kconvert.formats.base import Part

if TYPE_CHECKING:
    from kconvert.dialects.base import Scheme
    from kconvert.formats.base import Bytes, Tile

GROUP = 16
OTHERS = ("weight_global_scale", "input_global_scale", "input_scale")
SUFFIXES = frozenset({"weight_packed", "weight_scale", *OTHERS})


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """`others` are (suffix, dtype, shape) of the global scale and of what describes activations."""

    others: tuple[tuple[str, str, tuple[int, ...]], ...] = (("weight_global_scale", "F32", (1,)),)

    @property
    def label(self) -> str:
        return "nvfp4"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % GROUP:
            raise ValueError(f"its {cols} columns do not divide into groups of {GROUP}")
        return (
            Part("weight_packed", "U8", (rows, cols // 2)),
            Part("weight_scale", "F8_E4M3", (rows, cols // GROUP), values="nonnegative"),
            *(Part(suffix, dtype, shape, every=None, values="positive") for suffix, dtype, shape in self.others),
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


def recognise(
    scheme: Scheme | None, found: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int] | None
) -> tuple[Nvfp4, tuple[int, int]]:
    """See formats.base.Family."""
    if scheme is None:
        raise ValueError("config.json declares no quantisation for it")
    if from_scheme(scheme) is None:
        raise ValueError(f"its scheme {scheme} is not supported; supported: nvfp4, group 16")
    for suffix in ("weight_packed", "weight_scale", "weight_global_scale"):
        if suffix not in found:
            raise ValueError(f"it has no {suffix}")
    for suffix in OTHERS:
        if suffix in found and (found[suffix][0] != "F32" or found[suffix][1] not in ((), (1,))):
            raise ValueError(f"its {suffix} is {found[suffix][0]} {list(found[suffix][1])}, not one F32 number")
    packed = found["weight_packed"][1]
    if len(packed) != 2:
        raise ValueError(f"its weight_packed {list(packed)} is not a matrix")
    shape = shape or (packed[0], packed[1] * 2)
    return Nvfp4(tuple((suffix, *found[suffix]) for suffix in OTHERS if suffix in found)), shape
