"""What the loops share: floats as bits, the roundings of bf16, e4m3 and e2m1, the exponents of MX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kconvert.native.base import OPTIONS

F = TypeVar("F", bound=Callable[..., Any])
U = np.uint32  # around every operation on u32, which numba would otherwise widen to 64 bits
MAGNITUDE = U(0x7FFFFFFF)
INFINITE = U(0x7F800000)
E4M3_LARGEST = U(0x43E00000)  # 448 as f32
E4M3_NORMAL = U(121 << 23)  # 2^-6 as f32
E4M3_AHEAD, E2M1_AHEAD = U(20 << 23), U(22 << 23)  # from a binade to that whose last place is the last of its codes
E4M3_NAN = np.uint8(0x7F)
ONE, SIX = U(127 << 23), U(0x40C00000)  # 1 and 6 as f32


def inline(function: F) -> F:
    return njit(forceinline=True, **OPTIONS)(function)  # type: ignore[no-any-return]


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
    """The bits of a bf16 -> f32, exact."""
    return float_of(U(U(bf16) << U(16)))


@inline
def low_half(word: Any) -> Any:
    """The first of two bf16 in a u32 -> f32, exact. Pairs spare a vector the sorting of even and odd columns."""
    return float_of(U(U(word) << U(16)))


@inline
def high_half(word: Any) -> Any:
    return float_of(U(U(word) & U(0xFFFF0000)))


@inline
def round_pair(low: Any, high: Any) -> Any:
    """f32 twice -> a u32 of two bf16."""
    return U(U(round_bf16(low)) | U(U(round_bf16(high)) << U(16)))


@inline
def round_bf16(value: Any) -> Any:
    """f32 -> the bits of the nearest bf16, u16, half to even; NaN becomes the usual one."""
    bits = bits_of(value)
    rounded = U(U(bits + U(U(bits >> U(16)) & U(1))) + U(0x7FFF)) >> U(16)
    return np.uint16(U(0x7FC0) if U(bits & MAGNITUDE) > INFINITE else U(rounded))


@inline
def power(biased: Any) -> Any:
    """2 ** (biased - 127) as f32, for 0 to 254; the lowest is subnormal."""
    return float_of(U(U(biased) << U(23)) if U(biased) else U(1 << 22))


@inline
def widen_e4m3(code: Any) -> Any:
    """The bits of an e4m3 -> f32, exact. A subnormal one is given a hidden bit, which is taken away again: as a subnormal f32
    it would take Intel's cores twenty times as long."""
    size = U(code & np.uint8(0x7F))
    hidden = U(1 << 23) if size < U(8) else U(0)
    value = float_of(U(U(U(size << U(20)) + U(120 << 23)) + hidden)) - float_of(U(hidden * U(121)))
    bits = U(0x7FC00000) if size == U(E4M3_NAN) else bits_of(value)
    return float_of(U(bits | U(U(code & np.uint8(0x80)) << U(24))))


@inline
def _cut(value: Any, largest: Any, normal: Any, ahead: Any) -> Any:
    """The magnitude, `largest` at most, and what is so much larger than its binade, `normal` at least, that the last place of
    their sum is that of the code."""
    size = U(min(U(bits_of(value) & MAGNITUDE), largest))
    return float_of(size), float_of(U(U(max(U(size & INFINITE), normal)) + ahead))


@inline
def nearest_e4m3(value: Any) -> Any:
    """f32 -> the magnitude of the nearest e4m3, f32: half to even, 448 at most; not for NaN."""
    size, large = _cut(value, E4M3_LARGEST, E4M3_NORMAL, E4M3_AHEAD)
    return (size + large) - large


@inline
def round_e4m3(value: Any) -> Any:
    """f32 -> the bits of the nearest e4m3, half to even, 448 at most; not for NaN."""
    size, large = _cut(value, E4M3_LARGEST, E4M3_NORMAL, E4M3_AHEAD)
    steps = U(bits_of(size + large) - bits_of(large))
    code = U(steps + U(U(bits_of(large) - U(141 << 23)) >> U(20)))
    return np.uint8(U(code | U(U(bits_of(value) >> U(24)) & U(0x80))))


@inline
def unit_of(amax: Any) -> Any:
    """What makes values of this amax smaller than 2."""
    return power(U(U(254) - U(bits_of(amax) >> U(23))))


@inline
def mx_rule(amax: Any, largest: Any) -> Any:
    """The biased exponent of MX: that of amax, one more from a mantissa of 1.75 on, less that of the largest code."""
    rule = min(np.int32(U(bits_of(amax) + U(1 << 21)) >> U(23)), np.int32(254))
    return max(np.int32(rule - np.int32(largest)), np.int32(0))


@inline
def widen_e2m1(code: Any) -> Any:
    """The low nibble as e2m1 -> f32."""
    size = U(code & np.uint8(7))
    hidden = U(1 << 23) if size < U(2) else U(0)
    value = float_of(U(U(U(size << U(22)) + U(126 << 23)) + hidden)) - float_of(U(hidden * U(127)))
    return float_of(U(bits_of(value) | U(U(code & np.uint8(8)) << U(28))))


@inline
def nearest_e2m1(value: Any) -> Any:
    """f32 -> the magnitude of the nearest e2m1, f32: half to even."""
    size, large = _cut(value, SIX, ONE, E2M1_AHEAD)
    return (size + large) - large


@inline
def round_e2m1(value: Any) -> Any:
    """f32 -> the code of the nearest e2m1, u32. Zeros are positive; what is negative and rounds to zero is not."""
    size, large = _cut(value, SIX, ONE, E2M1_AHEAD)
    steps = U(bits_of(size + large) - bits_of(large))
    return U(U(steps + U(U(bits_of(large) - U(149 << 23)) >> U(22))) | (U(8) if value < np.float32(0) else U(0)))
