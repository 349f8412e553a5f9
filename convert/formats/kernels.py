"""Numba kernels of the formats: tight loops over caller-owned buffers, without the GIL, compiled once and cached.

Each equals the function of the same name in `reference.py` bit for bit. Arrays are two-dimensional with one quantisation
group a row, because LLVM vectorises loops of that shape. bf16 travels as the upper half of an f32, in u16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    return njit(nogil=True, cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def inline(function: F) -> F:
    return njit(nogil=True, inline="always", error_model="numpy")(function)  # type: ignore[no-any-return]


@intrinsic
def float_of(_context: Any, bits: Any) -> Any:
    """The f32 with these 32 bits."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """The 32 bits of an f32."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@inline
def widen(bf16: Any) -> Any:
    """bf16 bits -> f32, exact."""
    return float_of(np.uint32(bf16) << np.uint32(16))


@inline
def round_bits(value: Any) -> Any:
    """f32 -> its bits rounded to bf16, half to even, in the upper 16 (the lower ones are rubbish); not for NaN."""
    bits = bits_of(value)
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@inline
def round_bf16(value: Any) -> Any:
    """f32 -> the nearest bf16, half to even, as f32; not for NaN."""
    return float_of(round_bits(value) & np.uint32(0xFFFF0000))


@kernel
def decode_int4(packed: Any, scale: Any, tile: Any) -> None:
    """packed u8 [groups, g/2], scale u16 [groups] of bf16 bits -> tile f32 [groups, g] = bf16((nibble - 8) * scale)."""
    for group in range(scale.shape[0]):
        step = widen(scale[group])
        for j in range(tile.shape[1] // 2):
            byte = packed[group, j]
            tile[group, 2 * j] = round_bf16(np.float32(np.int32(byte & 15) - np.int32(8)) * step)
            tile[group, 2 * j + 1] = round_bf16(np.float32(np.int32(byte >> 4) - np.int32(8)) * step)


@kernel
def decode_bf16(bits: Any, tile: Any) -> None:
    """bits u16 [n] of bf16 -> tile f32 [n], exact."""
    for i in range(tile.shape[0]):
        tile[i] = widen(bits[i])


@kernel
def encode_bf16(tile: Any, out: Any) -> None:
    """tile f32 [n] -> out u16 [n], the bits of the nearest bf16, half to even."""
    for i in range(tile.shape[0]):
        out[i] = np.uint16(round_bits(tile[i]) >> np.uint32(16))


@kernel
def encode_int4(tile: Any, divisor: Any, lowest: Any, packed: Any, scale: Any) -> None:
    """tile f32 [groups, g] -> packed u8 [groups, g/2] and scale u16 [groups] of bf16 bits.

    scale = bf16(amax / divisor), code = clamp(round_half_even(value / scale), lowest, 7), stored as code + 8; a group whose
    scale is zero has the codes 0.
    """
    for group in range(scale.shape[0]):
        amax = np.float32(0)
        for i in range(tile.shape[1]):
            amax = max(amax, abs(tile[group, i]))
        bits = round_bits(amax / divisor) >> np.uint32(16)
        scale[group] = np.uint16(bits)
        step = widen(bits) if bits else np.float32(np.inf)
        for j in range(tile.shape[1] // 2):
            low = min(max(np.rint(tile[group, 2 * j] / step), lowest), np.float32(7))
            high = min(max(np.rint(tile[group, 2 * j + 1] / step), lowest), np.float32(7))
            packed[group, j] = np.uint8(np.int32(low) + 8) | np.uint8((np.int32(high) + 8) << 4)


@kernel
def fill_synthetic(pool: Any, key: Any, first_row: Any, center: Any, gain: Any, tile: Any) -> None:
    """tile f32 [rows, cols] = center + gain * groups of 32 picked from pool f32 [n, 32], n a power of two.

    Which group goes where depends on `key` and the place in the weight only (SplitMix64), not on how it is tiled.
    """
    groups = (tile.shape[1] + 31) // 32
    for row in range(tile.shape[0]):
        for group in range(groups):
            state = key + np.uint64((first_row + row) * groups + group) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            values = pool[np.int64((state ^ (state >> np.uint64(31))) & np.uint64(pool.shape[0] - 1))]
            target = tile[row, 32 * group : 32 * group + 32]
            for i in range(target.shape[0]):
                target[i] = center + gain * values[i]
