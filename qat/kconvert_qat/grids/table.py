"""The grids that experts are trained on: the encodings of kconvert.formats, with the rule that makes codes of values.

| grid | a scale for | conventions |
|---|---|---|
| `int4` | `group_size` columns | `kimi`, `compressed-tensors`, see formats.conventions |
| `mxfp4` | 32 columns | `compressed-tensors`: the exponent of amax, rounded up from a mantissa of 1.75, less two |
| `nvfp4` | 16 columns | `power-of-two`, which the scale of a matrix is; gate and up share it |
| `fp8-block` | 128 x 128 | `f32`: amax / 448; `ue8m0`: the smallest power of two that is not less |

The first convention is the default. Groups whose values codes and scales reproduce keep them; but not of `f32`, whose scales
amax does not tell. See formats.mx, formats.nvfp4 and formats.fp8 for the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kconvert.formats.base import Format
from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.reference import fp8, mx, nvfp4, packed
from kconvert_qat.grids.codes import Blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 128
POWERS = "ue8m0"


@dataclass(frozen=True)
class Grid:
    """`conventions` are what there is, the default first. `size` columns and `rows` rows share a scale; `any_size`: other
    multiples of 8 may be asked for.

    `format` takes group size and convention. So does `reference`, after f32 matrices [n, rows, cols] with bf16 values and the
    magnitude f32 [n] that none of each is above; it returns bf16. `table` makes the quantization_config of an export. `fuses`:
    gate and up share a number of the whole matrix.

    `kernel` makes of rows of a matrix on the CPU [n, cols], bf16 (in u16) or f32, what they are served as, given the same in
    numbers for that matrix; see grids.kernels.
    """

    name: str
    conventions: tuple[str, ...]
    size: int
    format: Callable[[int, str], Format]
    reference: Callable[[torch.Tensor, torch.Tensor, int, str], torch.Tensor]
    kernel: Callable[[NDArray[Any], NDArray[Any], float, int, str], None]
    table: Callable[[Any, list[str], list[str]], dict[str, Any]]
    any_size: bool = False
    rows: int = 1
    fuses: bool = False

    def blocks(self, group_size: int, convention: str) -> Blocks:
        return Blocks(self.format(group_size, convention), self.rows, group_size)

    def lays_out(self, cols: int, group_size: int) -> bool:
        """Whether matrices with so many columns have codes: blocks may be short, groups may not."""
        return self.rows > 1 or cols % group_size == 0


def _int4(group_size: int, convention: str) -> Packed:
    return Packed(group_size, convention=CONVENTIONS[convention], exact=True)


def _fp8(group_size: int, convention: str) -> Fp8:
    powers = convention == POWERS
    return Fp8(block=(BLOCK, group_size), powers=powers, exact=powers)


def _int4_served(matrices: torch.Tensor, reach: torch.Tensor, group_size: int, convention: str) -> torch.Tensor:
    return packed.fake_quantise(matrices, group_size, CONVENTIONS[convention]).bfloat16()


def _mxfp4_served(matrices: torch.Tensor, reach: torch.Tensor, group_size: int, convention: str) -> torch.Tensor:
    return mx.decode(*mx.encode(matrices.flatten(0, 1), 4, exact=True)).view(matrices.shape)


def _nvfp4_served(matrices: torch.Tensor, reach: torch.Tensor, group_size: int, convention: str) -> torch.Tensor:
    return nvfp4.fake_quantise(matrices, reach)


def _fp8_served(matrices: torch.Tensor, reach: torch.Tensor, group_size: int, convention: str) -> torch.Tensor:
    block = BLOCK, group_size
    coded = (fp8.encode(matrix, block, powers=convention == POWERS) for matrix in matrices)
    return torch.stack([fp8.decode(codes, scale, block) for codes, scale in coded])


def _int4_rows(rows: NDArray[Any], served: NDArray[Any], reach: float, group_size: int, convention: str) -> None:
    from kconvert_qat.grids import kernels

    rule = CONVENTIONS[convention]
    sizes = np.float32(rule.divisor), np.float32(rule.lowest), rule.rounds, rule.zero_bits
    kernels.int4(rows.reshape(-1, group_size), *sizes, served.reshape(-1, group_size))


def _mxfp4_rows(rows: NDArray[Any], served: NDArray[Any], reach: float, group_size: int, convention: str) -> None:
    from kconvert_qat.grids import kernels

    kernels.mxfp4(rows.reshape(-1, group_size), served.reshape(-1, group_size))


def _nvfp4_rows(rows: NDArray[Any], served: NDArray[Any], reach: float, group_size: int, convention: str) -> None:
    from kconvert_qat.grids import kernels

    factor = np.float32(nvfp4.global_factor(reach))
    kernels.nvfp4_by(factor, rows.reshape(-1, group_size), served.reshape(-1, group_size))


def _fp8_rows(rows: NDArray[Any], served: NDArray[Any], reach: float, group_size: int, convention: str) -> None:
    from kconvert_qat.grids import kernels

    kernels.fp8(rows, group_size, convention == POWERS, served)


def _packed_table(format: Packed, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.targets.hf import int4

    return int4(format, quantised, unquantised)


def _mx_table(format: Mx, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.targets.hf import mx

    return mx(format, quantised, unquantised)


def _nvfp4_table(format: Nvfp4, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.targets.hf import nvfp4

    return nvfp4(format, quantised, unquantised)


def _fp8_table(format: Fp8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.fp8 import fp8_table

    return fp8_table(unquantised, format.powers)


_ALL = (
    Grid("int4", tuple(CONVENTIONS), 32, _int4, _int4_served, _int4_rows, _packed_table, any_size=True),
    Grid("mxfp4", ("compressed-tensors",), 32, lambda *_: Mx(4, exact=True), _mxfp4_served, _mxfp4_rows, _mx_table),
    Grid(
        "nvfp4",
        ("power-of-two",),
        16,
        lambda *_: Nvfp4(exact=True),
        _nvfp4_served,
        _nvfp4_rows,
        _nvfp4_table,
        fuses=True,
    ),
    Grid("fp8-block", ("f32", POWERS), BLOCK, _fp8, _fp8_served, _fp8_rows, _fp8_table, rows=BLOCK),
)
GRIDS = {grid.name: grid for grid in _ALL}
