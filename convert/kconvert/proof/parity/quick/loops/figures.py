"""How far values are from those expected, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kconvert.native.base import OPTIONS
from kconvert.proof.parity.quick.loops.bits import U, inline, widen

ZERO = np.float64(0)
MAGNITUDE = np.uint64(0x7FFFFFFFFFFFFFFF)
FRACTION = np.uint64((1 << 52) - 1)
FIRST, SECOND, THIRD = (np.uint64(math.ceil((2 ** (k / 4) - 1) * 2**52)) for k in (1, 2, 3))  # quarters of an octave


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


@njit(forceinline=True, fastmath={"reassoc", "contract"}, **OPTIONS)
def _row(expected: Any, found: Any, first: Any, cols: Any) -> Any:
    """The sums of a^2, a e and e^2, in any order; the bits of the largest |a| and |e|, which have the order of these, NaN above
    all; and how many e are not 0."""
    signal, cross, noise = ZERO, ZERO, ZERO
    largest, worst, different = np.uint64(0), np.uint64(0), 0
    for i in range(cols):
        a = _wide(expected[first + i])
        e = _wide(found[first + i]) - a
        signal += a * a
        cross += a * e
        noise += e * e
        size = _bits(e) & MAGNITUDE
        largest = max(largest, _bits(a) & MAGNITUDE)
        worst = max(worst, size)
        different += size != np.uint64(0)
    return signal, cross, noise, largest, worst, different


def measure(expected: Any, found: Any, figures: Any, rows: Any, cols: Any) -> Any:
    """Floats [rows, cols] twice, a and a + e -> f64 [5, rows], see _row; returns how many e are not 0."""
    different = 0
    for row in range(rows):
        signal, cross, noise, largest, worst, count = _row(expected, found, row * cols, cols)
        figures[row] = signal
        figures[rows + row] = cross
        figures[2 * rows + row] = noise
        figures[3 * rows + row] = _float(largest)
        figures[4 * rows + row] = _float(worst)
        different += count
    return different


@inline
def _size(stored: Any) -> Any:
    """Zero where a bf16, an f32 or an f64 is: the bits but for the sign, as wide as it is."""
    return U(U(stored) & U(0x7FFF)) if _is_bf16(stored) else _bits(np.float64(stored)) & MAGNITUDE


def count_zero_groups(values: Any, rows: Any, cols: Any, size: Any) -> Any:
    """How many groups of `size` columns of floats [rows, cols] have no value other than zero; the last may be shorter."""
    count = 0
    for row in range(rows):
        first = row * cols
        while first < row * cols + cols:
            used = _size(values[first])
            for i in range(first, min(first + size, row * cols + cols)):
                used |= _size(values[i])
            count += used == 0
            first += size
    return count


def count_bytes(data: Any, counts: Any, count: Any) -> Any:
    """u8 [count] -> added to i64 [4, 256], each byte of four to counters of its own."""
    for i in range(count // 4):
        for k in range(4):
            counts[256 * k + data[4 * i + k]] += 1
    for i in range(count // 4 * 4, count):
        counts[data[i]] += 1
    return 0


def count_quarters(scales: Any, counts: Any, count: Any) -> Any:
    """f64 [count] by the floor of 4 log2 of their magnitude -> added to i64 [8192], of which 4092 is that of 1; but for zeros,
    subnormals and what is not finite."""
    for i in range(count):
        bits = _bits(scales[i]) & MAGNITUDE
        exponent, fraction = np.int64(bits >> np.uint64(52)), bits & FRACTION
        if 0 < exponent < 2047:
            counts[4 * exponent + (fraction >= FIRST) + (fraction >= SECOND) + (fraction >= THIRD)] += 1
    return 0
