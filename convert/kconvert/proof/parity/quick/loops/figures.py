"""How far values are from those expected, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kconvert.proof.parity.quick.loops.bits import U, inline, widen

ZERO = np.float64(0)
MAGNITUDE = np.uint64(0x7FFFFFFFFFFFFFFF)


@intrinsic
def _is_bf16(_context: Any, stored: Any) -> Any:
    """Whether it is the bits of a bf16, in u16, and not an f32 or an f64."""

    def codegen(_target: Any, _builder: Any, signature: Any, _args: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(signature.args[0] == types.uint16))

    return types.boolean(stored), codegen


@intrinsic
def _bits(_context: Any, value: Any) -> Any:
    """The 64 bits of an f64."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


@intrinsic
def _float(_context: Any, bits: Any) -> Any:
    """The f64 with these bits."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.uint64), codegen


@inline
def _wide(stored: Any) -> Any:
    """The bits of a bf16, an f32 or an f64 -> f64, exact."""
    return np.float64(widen(np.uint16(U(stored)))) if _is_bf16(stored) else np.float64(stored)


@njit(forceinline=True, error_model="numpy", fastmath={"reassoc"})
def _sums(expected: Any, found: Any, first: Any, cols: Any) -> Any:
    """The sums of a^2, a e and e^2, in any order."""
    signal, cross, noise = ZERO, ZERO, ZERO
    for i in range(cols):
        a = _wide(expected[first + i])
        e = _wide(found[first + i]) - a
        signal += a * a
        cross += a * e
        noise += e * e
    return signal, cross, noise


@inline
def _largest(expected: Any, found: Any, first: Any, cols: Any) -> Any:
    """The bits of the largest |a| and |e|, which have the order of these, NaN above all; and how many e are not 0."""
    largest, worst, different = np.uint64(0), np.uint64(0), 0
    for i in range(cols):
        a = _wide(expected[first + i])
        e = _bits(_wide(found[first + i]) - a) & MAGNITUDE
        largest = max(largest, _bits(a) & MAGNITUDE)
        worst = max(worst, e)
        different += e != np.uint64(0)
    return largest, worst, different


def measure(expected: Any, found: Any, figures: Any, rows: Any, cols: Any) -> Any:
    """Floats [rows, cols] twice, a and a + e -> f64 [5, rows], see _sums and _largest; returns how many e are not 0."""
    different = 0
    for row in range(rows):
        signal, cross, noise = _sums(expected, found, row * cols, cols)
        largest, worst, count = _largest(expected, found, row * cols, cols)
        figures[row] = signal
        figures[rows + row] = cross
        figures[2 * rows + row] = noise
        figures[3 * rows + row] = _float(largest)
        figures[4 * rows + row] = _float(worst)
        different += count
    return different


def count_zero_groups(values: Any, rows: Any, cols: Any, size: Any) -> Any:
    """How many groups of `size` columns of floats [rows, cols] have no value other than zero; the last may be shorter."""
    count = 0
    for row in range(rows):
        first = row * cols
        while first < row * cols + cols:
            used = np.uint64(0)
            for i in range(first, min(first + size, row * cols + cols)):
                used |= _bits(_wide(values[i])) & MAGNITUDE
            count += used == np.uint64(0)
            first += size
    return count
