"""Matrices of 32-bit words turned round, lines becoming columns.

Word by word that costs a load and a store for each, to places far apart. In blocks of eight by eight it costs one of each for
eight words, and in between what vector units do in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kconvert.formats.kernels.bits import kernel

SIDE = 8  # of a block
WORD, SIZE = ir.IntType(32), ir.IntType(64)
EIGHT = ir.VectorType(WORD, SIDE)
BYTES = ir.IntType(8).as_pointer()


@kernel
def turn(source: Any, first: Any, index: Any, target: Any) -> None:
    """source u32 [lines, >= first + rows], index u32 [n] -> target u32 [rows, >= n]: its column k is line index[k], from column
    `first` on.

    Blocks that would stick out are moved back, over what the block before has written.
    """
    count, rows = index.shape[0], target.shape[0]
    if count < SIDE or rows < SIDE:
        for k in range(count):
            for row in range(rows):
                target[row, k] = source[index[k], first + row]
        return
    for k in range(0, count, SIDE):
        for row in range(0, rows, SIDE):
            _turn_block(source, first, index, target, min(row, rows - SIDE), min(k, count - SIDE))


@intrinsic
def _turn_block(_context: Any, source: Any, first: Any, index: Any, target: Any, row: Any, k: Any) -> Any:
    """`turn` of eight rows and columns of the target, from `row` and `k` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def array(place: int) -> Any:
            return cgutils.create_struct_proxy(signature.args[place])(context, builder, value=args[place])

        source, index, target = array(0), array(2), array(3)
        _, first, _, _, row, k = args
        column, lines = builder.add(first, row), []
        for j in range(SIDE):
            line = builder.load(builder.gep(index.data, [builder.add(k, SIZE(j))]))
            lines.append(builder.load(_eight(builder, source, builder.zext(line, SIZE), column), align=4))
        for i, values in enumerate(_turned(builder, lines)):
            builder.store(values, _eight(builder, target, builder.add(row, SIZE(i)), k), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, index, target, types.int64, types.int64), codegen


def _eight(builder: Any, array: Any, line: Any, column: Any) -> Any:
    """Where eight words of a line begin."""
    start = builder.mul(builder.extract_value(array.strides, 0), line)
    offset = builder.add(start, builder.mul(column, SIZE(4)))
    return builder.bitcast(builder.gep(builder.bitcast(array.data, BYTES), [offset]), EIGHT.as_pointer())


def _turned(builder: Any, lines: list[Any]) -> list[Any]:
    """The columns of eight vectors, by three rounds in which the last four are dealt in between the first four."""
    half = SIDE // 2
    lower, upper = (
        ir.Constant(EIGHT, [WORD(start + lane // 2 + SIDE * (lane & 1)) for lane in range(SIDE)]) for start in (0, half)
    )
    for _ in range(3):
        pairs = zip(lines[:half], lines[half:], strict=True)
        lines = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in (lower, upper)]
    return lines
