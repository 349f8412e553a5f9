"""llama.cpp's blocks: 32 or 64 values of a row with their scales before them, one tensor in a GGUF file.

| type | bytes of a block | value |
|---|---|---|
| Q4_0 | scale F16; 16 bytes, byte j has n of value j in its low and of value j + 16 in its high nibble | (n - 8) * scale |
| Q8_0 | scale F16; 32 codes I8 | code * scale |
| MXFP4 | scale E8M0; e2m1 codes as in Q4_0 | code * 2^(scale - 127) |
| NVFP4 | of 64 values: 4 scales E4M3, without sign; 8 bytes for each 16 values, j low and j + 8 high | code * scale * factor |

Values are products in f32, exact in it but for the factor: an F32 for the weight in a tensor of its own, [experts] of a stack.
Q4_0 takes the codes of four-bit integers with a scale for each 32 columns or a multiple, and their scales as far as F16 has
them: the nearest otherwise, and then the groups are counted. Every bf16 scale from 2^-17 up to 65,280 is one of F16's. MXFP4
takes every group of MXFP4 as it is, and NVFP4 those of NVFP4. Its factor is ModelOpt's global scale, or 1 / that of
compressed-tensors; groups are counted whose bf16 values are not the same by that. Q8_0 rounds:

    scale = amax / 127, code = round_half_away(value * (1 / scale)), with the scale in f32; it is stored as F16

Source: https://github.com/ggml-org/llama.cpp, `ggml/src/ggml-common.h` and `quantize_row_q8_0_ref`;
of NVFP4 also `conversion/base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from kconvert.errors import Damaged, Unfit, some_have
from kconvert.formats.base import COUNTED, Fate, Format, Part
from kconvert.formats.dtypes import BLOCKS
from kconvert.formats.fp8 import widen
from kconvert.formats.kernels import Kernels
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import GROUP, Nvfp4, inverse_of, lost_by
from kconvert.formats.packed import SCALE_CODES, Packed
from kconvert.formats.stacks import MxStack

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Tile
    from kconvert.formats.conventions import Convention

kernels = Kernels("ggml")
BLOCK = 32
OVERFLOW = 65520.0  # from which on F16 has infinity
INTEGERS = {"I32": "i4", "I64": "i8"}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Blocks(Format):
    """What they have in common; `dtype` is a key of dtypes.BLOCKS."""

    dtype: ClassVar[str]

    @property
    def label(self) -> str:
        return self.dtype.lower()

    @property
    def value_dtype(self) -> str:
        return "F32"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % (size := BLOCKS[self.dtype][0]):
            raise ValueError(f"its {cols} columns do not divide into blocks of {size}")
        return (Part("weight", self.dtype, (rows, cols)),)

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        if cols % (size := BLOCKS[self.dtype][0]):
            raise ValueError(f"has {cols} columns, which do not divide into blocks of {size}")
        return self

    def _blocks(self, parts: Sequence[Bytes]) -> Bytes:
        return parts[0].reshape(-1, BLOCKS[self.dtype][1])


@dataclass(frozen=True, slots=True)
class Q4_0(Blocks):
    """`strict`: a group whose scale F16 has not is an error."""

    dtype: ClassVar[str] = "Q4_0"
    strict: bool = field(default=False, compare=False)

    def by_rule(self, convention: Convention, group_size: int, strict: bool) -> Q4_0:
        return replace(self, strict=strict)

    @property
    def shortfall(self) -> str:
        return "F16 has not the scales of {}, which got the nearest"

    def takes_codes(self, source: Format) -> bool:
        if not isinstance(source, Packed) or (source.group_size or BLOCK) % BLOCK:
            return False
        return source.bits == 4 and source.symmetric and not source.ordered and source.stack is None

    def fate(self, source: Format) -> Fate:
        if not isinstance(source, Packed):
            return "lossy"
        return "lossless" if source.scale_dtype == "F16" else "recovered"

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        blocks = self._blocks(parts)
        scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16)[:, 0].astype(np.float32)
        kernels.decode_nibbles(blocks, 2, np.arange(-8, 8, dtype=np.float32), scale, tile.reshape(-1, BLOCK))

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        import numpy as np

        assert isinstance(source, Packed)
        if not rows * cols:
            return 0
        halves = parts[0].view("u2").reshape(-1, BLOCKS[self.dtype][1] // 2)
        scale = inputs[1].view(SCALE_CODES[source.scale_dtype])
        codes = inputs[0].reshape(-1, BLOCK // 2)
        other = np.empty(1, np.float32)
        lost = kernels.recode_q4_0(codes, scale, halves[:, 0], halves[:, 1:], other)
        if lost == -1:
            raise Damaged("it has a scale of zero over codes that are not zero")
        if lost == -2:
            self.check_scales(source.parts(rows, cols)[1], inputs[1])
        if lost and self.strict:
            raise Unfit(f"{some_have(lost, 'groups')} scales that F16 has not, {other[0]:.9g} the first,", COUNTED)
        return lost

    def check_scales(self, part: Part, data: Bytes) -> None:
        import numpy as np

        if part.suffix != "weight_scale":
            return
        wide = widen(data, part.dtype)
        if (beyond := ~(np.abs(wide) < OVERFLOW)).any():
            raise Unfit(
                f"it has the scale {wide[beyond][0]:.9g}, which F16 cannot hold (65504 is its largest number),",
                "convert it --to bf16 first, of which --to gguf makes BF16 or, with --rest q8_0, Q8_0",
            )


@dataclass(frozen=True, slots=True)
class Q8_0(Blocks):
    dtype: ClassVar[str] = "Q8_0"

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        blocks = self._blocks(parts)
        values = tile.reshape(-1, BLOCK)
        values[:] = blocks[:, 2:].view(np.int8)
        values *= np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        import numpy as np

        blocks = self._blocks(parts)
        scale = np.empty(len(blocks), np.float32)
        kernels.encode_q8_0(tile.reshape(-1, BLOCK), scale, blocks[:, 2:].view(np.int8))
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if not np.isfinite(half).all() or not np.isfinite(tile).all():
            raise Unfit(
                f"it has the value {tile.flat[np.abs(tile).argmax()]:.9g}, not finite, or too large for a scale in F16,",
                "leave out --rest q8_0, without which it is BF16",
            )
        blocks[:, :2] = half.view(np.uint8).reshape(-1, 2)
        return 0


@dataclass(frozen=True, slots=True)
class Mxfp4(Blocks):
    dtype: ClassVar[str] = "MXFP4"

    @property
    def label(self) -> str:
        return "mxfp4 blocks"

    def takes_codes(self, source: Format) -> bool:
        return isinstance(source, MxStack) or (isinstance(source, Mx) and source.bits == 4)

    def fate(self, source: Format) -> Fate:
        return "lossless" if self.takes_codes(source) else "lossy"

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        blocks = self._blocks(parts)
        values = np.array((*E2M1, *(-value for value in E2M1)), np.float32)
        scale = np.ldexp(np.float32(1), blocks[:, 0].astype(np.int32) - 127)
        scale[blocks[:, 0] == 255] = np.nan
        kernels.decode_nibbles(blocks, 1, values, scale, tile.reshape(-1, BLOCK))

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        import numpy as np

        blocks = self._blocks(parts)
        pairs = np.ndarray((len(blocks), BLOCK // 4), "u2", blocks, 1, (blocks.shape[1], 2))  # at odd addresses
        kernels.recode_mxfp4(inputs[0].reshape(-1, BLOCK // 2), inputs[1], blocks[:, 0], pairs)
        return 0


@dataclass(frozen=True, slots=True)
class Nvfp4Blocks(Blocks):
    """With its factor. Written only. `strict`: a group whose values change by the inverse of its global scale is an error."""

    dtype: ClassVar[str] = "NVFP4"
    strict: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        return "nvfp4 blocks"

    @property
    def shortfall(self) -> str:
        return "1 / global scale, in F32, changes values of {}"

    def takes_codes(self, source: Format) -> bool:
        return isinstance(source, Nvfp4)

    def fate(self, source: Format) -> Fate:
        if not isinstance(source, Nvfp4):
            return "lossy"
        return "lossless" if source.multiplies else "recovered"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return *Blocks.parts(self, rows, cols), Part("scale", "F32", (1,), every=None)

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        assert isinstance(source, Nvfp4)
        codes, scale, given = inputs[0].reshape(-1, GROUP // 2), inputs[1], inputs[2].view("f4")[0]
        factor = given if source.multiplies else inverse_of(given)
        parts[1].view("f4")[0] = factor
        kernels.recode_nvfp4(codes, scale, parts[0].view("u2").reshape(-1, BLOCKS[self.dtype][1] // 2))
        if source.multiplies:
            return 0
        lost = lost_by(codes, scale, (given, False), (factor, True))
        if lost and self.strict:
            raise Unfit(f"{some_have(lost, 'groups')} other values by 1 / global scale in F32,", COUNTED)
        return lost


@dataclass(frozen=True, slots=True)
class Integers(Format):
    """A table of integers of `dtype` (a key of INTEGERS), in the source of numbers in [0, below); I32 in GGUF files."""

    dtype: str
    below: int | None = None

    @property
    def label(self) -> str:
        return self.dtype.lower()

    @property
    def quantised(self) -> bool:
        return False

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return (Part("", self.dtype, (rows, cols), below=self.below),)

    def takes_codes(self, source: Format) -> bool:
        return isinstance(source, Integers)

    def fate(self, source: Format) -> Fate:
        return "lossless"

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        assert isinstance(source, Integers)
        parts[0].view("i4")[:] = inputs[0].view(INTEGERS[source.dtype])
        return 0


@dataclass(frozen=True, slots=True)
class Whole(Format):
    """A weight [1, n] or [rows, cols] as the one tensor of the output's name, in `shape`. Written only."""

    format: Format
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        return self.format.label

    @property
    def quantised(self) -> bool:
        return self.format.quantised

    def fate(self, source: Format) -> Fate:
        return self.format.fate(source)

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        (part,) = self.format.parts(rows, cols)
        return (Part("", part.dtype, self.shape, every=part.every),)

    def takes_codes(self, source: Format) -> bool:
        return self.format.takes_codes(source)

    def check_scales(self, part: Part, data: Bytes) -> None:
        self.format.check_scales(part, data)

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        return self.format.encode(tile, parts)

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        return self.format.recode(source, inputs, rows, cols, parts)
