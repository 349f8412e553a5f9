"""What integer formats share: a row's codes, which are spread to a byte each, and the values of a group.

A group of four-bit codes has sixteen values at most. Where one instruction looks sixteen codes up among sixteen values, these
are worked out once a group instead of each code's: this is nearly as fast as memory takes the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from kconvert.formats.kernels.bits import as_held, inline, round_like
from kconvert.native.base import has

USUAL = 32  # values of a group: a loop of this known length is vectors alone, without a remainder
NIBBLES = 16
LOOKS_UP = has("avx512f")  # whether there is that instruction
WORD, VALUE = ir.IntType(32), ir.FloatType()
PAIR, CODES, VALUES = ir.VectorType(WORD, 2), ir.VectorType(WORD, NIBBLES), ir.VectorType(VALUE, NIBBLES)
HALVES = ir.VectorType(ir.IntType(16), NIBBLES)


@inline
def spread_nibbles(line: Any, codes: Any) -> None:
    """line u8 [>= cols / 2], the lower nibble first -> codes u8 [cols]."""
    half = codes.shape[0] // 2
    for j in range(half):
        codes[2 * j] = line[j] & np.uint8(15)
        codes[2 * j + 1] = line[j] >> np.uint8(4)
    if codes.shape[0] & 1:
        codes[2 * half] = line[half] & np.uint8(15)


@inline
def decode_group(codes: Any, row: Any, group: Any, offset: Any, scale: Any, like: Any, tile: Any, size: Any) -> None:
    """codes u8 [groups, g] of a row, offset and scale f32 of a group -> tile f32 or bf16 [rows, groups, g]
    = (code - offset) * scale, rounded as numbers of `like`'s type are."""
    for i in range(size):
        tile[row, group, i] = as_held(round_like((np.float32(np.int32(codes[group, i])) - offset) * scale, like), tile)


@inline
def differ(codes: Any, group: Any, offset: Any) -> Any:
    """Whether a code of the group is not its offset."""
    found = False
    for i in range(codes.shape[1]):
        found |= np.float32(np.int32(codes[group, i])) != offset
    return found


def by_table(scale: Any, bits: Any, size: Any) -> Any:
    """Whether codes with scales of this type are decoded by decode_by_table."""
    raise NotImplementedError("only in kernels")


@overload(by_table, strict=False)
def _by_table(scale: Any, bits: Any, size: Any) -> Any:
    possible = LOOKS_UP and scale.dtype == types.uint16
    return lambda scale, bits, size: possible and bits == 4 and size % NIBBLES == 0


@inline
def decode_by_table(words: Any, row: Any, group: Any, offset: Any, scale: Any, tile: Any, size: Any) -> None:
    """decode_group, rounded to bf16, of four-bit codes in words u8 [rows, n], the lower nibble first; size a multiple of 16."""
    if size == USUAL:
        for i in range(0, USUAL, NIBBLES):
            look_up(offset, scale, words, row, group * USUAL + i >> 1, 0, tile, row, group, i)
    else:
        for i in range(0, size, NIBBLES):
            look_up(offset, scale, words, row, group * size + i >> 1, 0, tile, row, group, i)


@intrinsic
def look_up(
    _context: Any,
    offset: Any,
    scale: Any,
    words: Any,
    line: Any,
    place: Any,
    shift: Any,
    tile: Any,
    row: Any,
    group: Any,
    i: Any,
) -> Any:
    """Sixteen values of tile f32 or bf16 [rows, groups, g] from `i` on, as decode_group has them rounded to bf16, by a table.

    The codes are in words [lines, n] from `place` on: u8 have two, the lower nibble first, u32 one from `shift` on. Only where
    LOOKS_UP; elsewhere it does nothing, as its callers are compiled there, too, without that instruction.
    """
    streamed, narrow = words.dtype == types.uint8, tile.dtype == types.uint16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        offset, scale, _, line, place, shift, _, row, group, i = args

        def vector(array: int, kind: Any, *indices: Any) -> Any:
            """Where it begins in an array argument."""
            struct = cgutils.create_struct_proxy(signature.args[array])(context, builder, value=args[array])
            pointer = cgutils.get_item_pointer(context, builder, signature.args[array], struct, indices)
            return builder.bitcast(pointer, kind.as_pointer())

        if not LOOKS_UP:
            return context.get_dummy_value()
        stored = builder.load(vector(2, PAIR if streamed else CODES, line, place), align=1)
        if streamed:
            stored = builder.shuffle_vector(stored, stored, ir.Constant(CODES, [WORD(k // 8) for k in range(NIBBLES)]))
            shifts = ir.Constant(CODES, [WORD(4 * (k % 8)) for k in range(NIBBLES)])
        else:
            shifts = _all(builder, builder.trunc(shift, WORD))
        codes = builder.lshr(stored, shifts)  # whose four lowest bits the instruction takes
        permute = ir.FunctionType(CODES, [CODES, CODES])
        function = cgutils.get_or_insert_function(builder.module, permute, "llvm.x86.avx512.permvar.si.512")
        bits = builder.call(function, [_table(builder, offset, scale, narrow), codes])
        if narrow:
            builder.store(builder.trunc(bits, HALVES), vector(6, HALVES, row, group, i), align=2)
        else:
            builder.store(bits, vector(6, CODES, row, group, i), align=4)
        return context.get_dummy_value()

    where = types.int64
    return types.void(types.float32, types.float32, words, where, where, where, tile, where, where, where), codegen


def _table(builder: Any, offset: Any, scale: Any, narrow: bool) -> Any:
    """The bits of the values of all codes, of bf16 if `narrow`; like bits.round_bf16."""
    codes = ir.Constant(VALUES, [VALUE(float(code)) for code in range(NIBBLES)])
    exact = builder.fmul(builder.fsub(codes, _all(builder, offset)), _all(builder, scale))
    bits = builder.bitcast(exact, CODES)
    odd = builder.and_(builder.lshr(bits, _all(builder, WORD(16))), _all(builder, WORD(1)))
    rounded = builder.add(builder.add(bits, _all(builder, WORD(0x7FFF))), odd)
    if narrow:
        return builder.lshr(rounded, _all(builder, WORD(16)))
    return builder.and_(rounded, _all(builder, WORD(0xFFFF0000)))


def _all(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    kind = ir.VectorType(number.type, NIBBLES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, WORD(0))
    return builder.shuffle_vector(one, one, ir.Constant(CODES, None))
