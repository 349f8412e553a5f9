"""GPTQ's and AWQ's packed integers: matrices that lie [in, out] in the file, packed along the input or the output axis.

| tensor | GPTQ | AWQ (`gemm`) |
|---|---|---|
| qweight | I32 [ceil(in * bits / 32), out]; codes are a stream down a column | I32 [in, out / 8]; rows 8m to 8m + 7 of the |
| | | weight are the nibbles 0, 4, 1, 5, 2, 6, 3, 7 of word m |
| qzeros | I32 [groups, ceil(out * bits / 32)]; a stream along a row | I32 [groups, out / 8], as qweight |
| scales | F16, BF16 or F32 [groups, out] | the same |
| g_idx | I32 [in], the group of each column of the weight; without it column j is in group j / group size | none |

In a stream the lowest bits of a word are first. Codes have two to eight bits in GPTQ, four in AWQ; of three, five, six and
seven they go from one word into the next, and rows and columns are multiples of 32. There are ceil(in / group size) groups, of
which the last may be shorter.

Value of a weight: bf16((code - zero point) * scale), a product in f32. A scale may be negative (auto-round gives the largest
value of a group the lowest code, and a code at the zero point then means -0).
ZEROS says how a zero point is stored: the first version of GPTQ's files has one less.
Sources: https://github.com/ModelCloud/GPTQModel, `nn_modules/qlinear` and `quantization/awq`;
https://github.com/intel/auto-round, `auto_round_extension/torch` and `utils/bit_packing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kconvert.errors import Damaged
from kconvert.formats.base import Format, Part, refuse_surplus, require
from kconvert.formats.kernels import Kernels
from kconvert.formats.packed import SCALE_CODES
from kconvert.native.base import has

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kconvert.formats.base import Bytes, Found, Scheme, Tile

    Words = NDArray[np.uint32]

kernels, turn = Kernels("gptq"), Kernels("turn").turn
SUFFIXES = frozenset({"qweight", "qzeros", "scales", "g_idx"})
# By a scheme's format: whether one was taken off each word of zero points at once, with what that borrows from the next
# zero point; what is to be added to each; and whether the sum stays within the bits of a code.
ZEROS = {
    "gptq": (False, 1, True),
    "gptqmodel": (True, 0, True),  # as it writes the first version's files
    "auto-round": (False, 1, False),
    "gptq_v2": (False, 0, True),
    "awq": (False, 0, True),
}
KINDS = frozenset((format, "int") for format in ZEROS)
READS = "GPTQ's integers of two to eight bits and AWQ's of four, by group"
ALIGNED = (2, 4, 8)  # bits of codes of which a word has a whole number
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
PADDING = 16  # words behind each row, so that rows of a power of two words do not share their place in the cache
NIBBLES = 16  # that one instruction looks up


@dataclass(frozen=True, slots=True)
class Gptq(Format):
    """`spelling` is a key of ZEROS, `group_size` None: a whole row shares a scale; `ordered`: there is a g_idx."""

    group_size: int | None
    spelling: str = "gptq"
    bits: int = 4
    symmetric: bool = True
    scale_dtype: str = "F16"
    ordered: bool = False

    @property
    def label(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "channel"
        name = "awq" if self.interleaved else "gptq"
        return (
            f"{name} int{self.bits} {group}" + ("" if self.symmetric else " asymmetric") + " with g_idx" * self.ordered
        )

    @property
    def interleaved(self) -> bool:
        """Whether it is AWQ's."""
        return self.spelling == "awq"

    @property
    def recoverable(self) -> bool:
        return self.bits <= 4

    @property
    def in_unit(self) -> int:
        """How many codes begin with a word and end with one."""
        return 32 // self.bits if self.bits in ALIGNED else 32

    def groups(self, cols: int) -> int:
        """How many there are in a weight of `cols` columns."""
        return math.ceil(cols / (self.group_size or max(cols, 1)))

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        unit, groups = self.in_unit, self.groups(cols)
        if self.interleaved and cols % (self.group_size or 1):
            raise ValueError(f"its {cols} columns do not divide into groups of {self.group_size}")
        if (self.interleaved or self.bits not in ALIGNED) and rows % unit:
            raise ValueError(f"its {rows} rows do not divide into words of {unit} codes")
        if self.bits not in ALIGNED and cols % unit:
            raise ValueError(f"its {cols} columns do not divide into words of {unit} codes")
        words = math.ceil(rows * self.bits / 32)
        codes = Part("qweight", "I32", (math.ceil(cols * self.bits / 32), rows), across=True)
        if self.interleaved:
            codes = Part("qweight", "I32", (cols, words), every=unit, across=True)
        index = (Part("g_idx", "I32", (cols,), every=None, below=groups),) if self.ordered else ()
        return (
            codes,
            Part("qzeros", "I32", (groups, words), every=unit, across=True),
            Part("scales", self.scale_dtype, (groups, rows), values="finite", across=True),
            *index,
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        if not tile.size:
            return
        rows, cols = tile.shape
        height = 8 if self.interleaved else 1  # rows that share the words of a column
        words = parts[0].view("u4").reshape(cols if self.interleaved else math.ceil(cols * self.bits / 32), -1)
        turned = np.empty((math.ceil(rows / height), len(words) + PADDING), "u4")
        turn(words, first_row // height, _groups_of_columns(len(words), 1), turned)
        if self._decode_by_table(turned, parts, first_row, tile):
            return
        steps, zeros = self._steps_and_zeros(parts, first_row, rows, self.groups(cols))
        if self._decode_rows(turned, parts[3:], steps, zeros, tile):
            raise Damaged("it has a scale of zero over codes that are not zero")

    def _decode_by_table(self, turned: Words, parts: Sequence[Bytes], first_row: int, tile: Tile) -> Any:
        """Whether it could, see kernels.gptq."""
        import numpy as np

        cols = tile.shape[1]
        size, groups = self.group_size or cols, self.groups(cols)
        if not has("avx512f") or self.bits != 4 or size % NIBBLES or not self._regular(parts[3:], cols):
            return False
        scale = parts[2].view(SCALE_CODES[self.scale_dtype]).reshape(groups, -1)
        zeros, shifts, height = parts[1].view("u4").reshape(groups, -1), self._shifts, 8 if self.interleaved else 1
        words = turned if self.interleaved else turned.view("u1")
        grouped = tile.reshape(len(tile), groups, size)
        room = np.empty((2, groups, 8), np.float32)
        return kernels.decode_by_table(words, height, scale, zeros, shifts, *self._zero_rule, first_row, *room, grouped)

    def _regular(self, index: Sequence[Bytes], cols: int) -> bool:
        """Whether groups are of neighbours, all of one size."""
        import numpy as np

        size = self.group_size or cols
        return cols % size == 0 and (not index or np.array_equal(index[0].view("u4"), _groups_of_columns(cols, size)))

    def _decode_rows(self, turned: Words, index: Sequence[Bytes], steps: Tile, zeros: Tile, tile: Tile) -> Any:
        """By the kernel for these codes; whether it has met a senseless scale."""
        import numpy as np

        rows, cols = tile.shape
        size = self.group_size or cols
        groups = index[0].view("u4") if index else _groups_of_columns(cols, size)
        regular = self._regular(index, cols)
        grouped = tile.reshape(rows, -1, size) if regular else tile
        if self.interleaved:
            return kernels.decode_interleaved(turned, _shifts_of(4, ORDER), steps, zeros, grouped)
        codes = np.empty(cols, np.uint8)
        if regular:
            return kernels.decode(turned, self.bits, steps, zeros, codes, grouped)
        room = np.empty((2, 8, cols + PADDING), np.float32)
        return kernels.decode_indexed(turned, self.bits, steps, zeros, groups, codes, *room, grouped)

    def _steps_and_zeros(self, parts: Sequence[Bytes], first: int, rows: int, groups: int) -> tuple[Tile, Tile]:
        """Scales and zero points of so many rows from `first` on, f32 [groups, rows]; of the latter perhaps more."""
        import numpy as np

        steps = np.empty((groups, rows), "f4")
        kernels.widen_scales(parts[2].view(SCALE_CODES[self.scale_dtype]).reshape(groups, -1), first, steps)
        unit = self.in_unit
        words = parts[1].view("u4").reshape(groups, -1)[:, first // unit * (unit * self.bits // 32) :]
        zeros = np.empty((groups, math.ceil(rows / unit) * unit), "f4")
        codes = np.empty(zeros.shape[1], np.uint8)
        kernels.unpack_zeros(words, self.bits, self._shifts, *self._zero_rule, codes, zeros)
        return steps, zeros

    @property
    def _shifts(self) -> Words:
        """Where in a word of zero points they begin, if that is the same in all."""
        order = ORDER if self.interleaved else range(self.in_unit)
        return _shifts_of(self.bits, order if self.bits in ALIGNED else ())

    @property
    def _zero_rule(self) -> tuple[int, int, int]:
        """What is added to a word of zero points, what to each, and which bits are kept; see kernels.gptq.unpack_zeros."""
        by_words, plus, within = ZEROS[self.spelling]
        mask, carry = (1 << self.bits) - 1, 0
        if by_words and self.bits in ALIGNED:
            carry = sum(1 << self.bits * place for place in range(self.in_unit))
        elif by_words:  # a word has no whole number of codes: gptqmodel takes one off each
            plus = 1
        return carry, plus, mask if within else 2 * mask + 1


@cache
def _shifts_of(bits: int, order: Sequence[int]) -> Words:
    """Where in a word its codes begin, as u32."""
    import numpy as np

    shifts: Words = np.array(order, "u4") * np.uint32(bits)
    return shifts


@cache
def _groups_of_columns(cols: int, size: int) -> Words:
    import numpy as np

    groups: Words = np.arange(cols, dtype="u4") // np.uint32(size)
    return groups


def from_scheme(scheme: Scheme) -> Gptq | None:
    """See formats.base.Family."""
    bits = (4,) if scheme.format == "awq" else range(2, 9)
    if (scheme.format, scheme.type) not in KINDS or scheme.num_bits not in bits:
        return None
    return Gptq(scheme.group_size, scheme.format, scheme.num_bits, scheme.symmetric, ordered=scheme.ordered)


def recognise(declared: Gptq, found: Found, shape: tuple[int, int] | None) -> tuple[Gptq, tuple[int, int]]:
    """See formats.base.Family."""
    require(found, "qweight", "qzeros", "scales")
    refuse_surplus(found, SUFFIXES - {"g_idx"} if declared.interleaved else SUFFIXES)
    codes, (scale_dtype, scale) = found["qweight"][1], found["scales"]
    if declared.ordered:
        require(found, "g_idx")
    if scale_dtype not in SCALE_CODES:
        raise ValueError(f"its scales are {scale_dtype}, not F16, BF16 or F32")
    if len(codes) != 2 or len(scale) != 2:
        raise ValueError(f"its qweight {list(codes)} and scales {list(scale)} are not two matrices")
    format = replace(declared, scale_dtype=scale_dtype, ordered="g_idx" in found)
    if shape is None:
        cols = codes[0] if declared.interleaved else codes[0] * 32 // declared.bits
        index = found["g_idx"][1] if "g_idx" in found else (cols,)
        shape = (scale[1], index[0] if len(index) == 1 else cols)
    return format, shape
