"""What the kernels share: how they are compiled, and rounding to bf16 by integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from kconvert.formats.conventions import LARGEST_ERROR
from kconvert.native.base import OPTIONS

F = TypeVar("F", bound=Callable[..., Any])
INFINITE = np.uint32(0x7F800000)  # as f32, and the bits of its exponent
MAGNITUDE = np.uint32(0x7FFFFFFF)  # all bits but the sign


def kernel(function: F) -> F:
    return njit(**OPTIONS)(function)  # type: ignore[no-any-return]


def inline(function: F) -> F:
    return njit(forceinline=True, **OPTIONS)(function)  # type: ignore[no-any-return]


@intrinsic
def address(_context: Any, array: Any) -> Any:
    """Of an array's first element, for `carray`: what is seen as another type, or in another shape, raises nothing."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0]).data
        return builder.bitcast(data, ir.IntType(8).as_pointer())

    return types.voidptr(array), codegen


@intrinsic(prefer_literal=True)
def local(_context: Any, nbytes: Any) -> Any:
    """The address of so many bytes, a constant, on the stack, for `carray`."""

    def codegen(_target: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), nbytes.literal_value))
        room.align = 64
        return builder.bitcast(room, ir.IntType(8).as_pointer())

    return (types.voidptr(nbytes), codegen) if isinstance(nbytes, types.IntegerLiteral) else None


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
    return float_of(np.uint32(np.uint32(bf16) << np.uint32(16)))


@inline
def round_bits(value: Any) -> Any:
    """f32 -> its bits rounded to bf16, half to even, in the upper 16 (the lower ones are rubbish); not for NaN."""
    bits = bits_of(value)
    return np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))


@inline
def round_bf16(value: Any) -> Any:
    """f32 -> the nearest bf16, half to even, as f32; not for NaN."""
    return float_of(np.uint32(round_bits(value) & np.uint32(0xFFFF0000)))


@inline
def amax_bits(tile: Any, group: Any) -> Any:
    """Bits of the largest magnitude of tile[group]; in the order of bits NaN lies above infinity, above every number."""
    amax = np.uint32(0)
    for i in range(tile.shape[1]):
        magnitude = np.uint32(bits_of(tile[group, i]) & MAGNITUDE)
        amax = magnitude if magnitude > amax else amax
    return amax


@inline
def largest_bits(tile: Any, group: Any) -> Any:
    """Bits of the largest positive value of tile[group], 0 if there is none."""
    largest = np.int32(0)
    for i in range(tile.shape[1]):
        value = np.int32(bits_of(tile[group, i]))  # as signed numbers, the bits of negative values are negative
        largest = value if value > largest else largest
    return np.uint32(largest)


@inline
def smallest_bits(tile: Any, group: Any) -> Any:
    """Bits of the smallest magnitude of tile[group] that is not zero; of NaN if there is none."""
    smallest = MAGNITUDE
    for i in range(tile.shape[1]):
        magnitude = np.uint32(bits_of(tile[group, i]) & MAGNITUDE)
        below = np.uint32(magnitude - np.uint32(1))  # zero becomes the largest of all
        smallest = below if below < smallest else smallest
    return np.uint32(smallest + np.uint32(1)) if smallest < MAGNITUDE else MAGNITUDE


@inline
def pack_pairs(codes: Any, group: Any, packed: Any) -> None:
    """Nibbles u8 [2 n] -> packed[group] u8 [n], of two the first one low."""
    pairs = carray(address(codes), codes.shape[0] // 2, np.uint16)
    for j in range(pairs.shape[0]):
        packed[group, j] = np.uint8(pairs[j] | (pairs[j] >> np.uint16(4)))


@inline
def power(biased: Any) -> Any:
    """2 ** (biased - 127) as f32, for 0 to 254; the lowest is subnormal."""
    return float_of(np.uint32(np.uint32(biased) << np.uint32(23)) if biased else np.uint32(1 << 22))


@inline
def error_unit(amax: Any) -> Any:
    """What makes values of this amax (its bits) smaller than 2: a power of two."""
    return power(np.uint32(np.uint32(254) - np.uint32(amax >> np.uint32(23))))


@inline
def error_places(size: Any) -> Any:
    """The fixed point of squared errors: the sum of `size` of them, each below 4, stays below 2^31."""
    places = np.float32(2.0**29)
    while size > 1:
        places *= np.float32(0.5)
        size = (size + 1) >> 1
    return places


@inline
def squared_error(value: Any, served: Any, unit: Any, places: Any) -> Any:
    """(value - served)^2 in units of amax, as a fixed-point i32: integers have the same sum in any order.

    Errors stay below 2 units but where `served` is infinite, next to the largest bf16.
    """
    error = min(abs((value - served) * unit), np.float32(LARGEST_ERROR))
    return np.int32(error * error * places)


@inline
def widen_f16(f16: Any) -> Any:
    """f16 bits of a finite number -> f32, exact: the multiplication mends the exponent, of subnormals too."""
    bits = np.uint32(f16)
    magnitude = float_of((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    return float_of(bits_of(magnitude) | ((bits & np.uint32(0x8000)) << np.uint32(16)))


@inline
def round_f16(value: Any) -> Any:
    """f32 -> the nearest f16, half to even, as f32; 65520 and more are infinite; not for NaN."""
    bits = bits_of(value)
    magnitude = float_of(bits & MAGNITUDE)
    # A number 2^13 times larger has its last place in f32 where this one has it in f16, which below 2^-14 is fixed point.
    exponent = max(bits & INFINITE, np.uint32(0x38800000))
    large = float_of(exponent + np.uint32(13 << 23))
    rounded = (magnitude + large) - large
    rounded = np.float32(np.inf) if magnitude >= np.float32(65520) else rounded
    return float_of(bits_of(rounded) | (bits & np.uint32(0x80000000)))


def widen_scale(stored: Any) -> Any:
    """A stored scale -> f32, exact: bf16 in u16, f16 in i16 (so that the type tells them apart), or an f32."""
    raise NotImplementedError("only in kernels")


def round_like(value: Any, stored: Any) -> Any:
    """f32 -> the nearest number of the stored scale's type, half to even, as f32."""
    raise NotImplementedError("only in kernels")


@overload(widen_scale, strict=False)
def _widen_scale(stored: Any) -> Any:
    by_type = {
        types.uint16: lambda stored: widen(stored),  # noqa: PLW0108 (numba compares the arguments' names)
        types.int16: lambda stored: widen_f16(stored),  # noqa: PLW0108
        types.float32: lambda stored: stored,
    }
    return by_type.get(stored)


@overload(round_like, strict=False)
def _round_like(value: Any, stored: Any) -> Any:
    by_type = {
        types.uint16: lambda value, stored: round_bf16(value),
        types.int16: lambda value, stored: round_f16(value),
        types.float32: lambda value, stored: value,
    }
    return by_type.get(stored)


def as_held(value: Any, array: Any) -> Any:
    """f32 -> what an array has for it: itself, or the bits of the nearest bf16 where that is bf16 in u16."""
    raise NotImplementedError("only in kernels")


@overload(as_held, strict=False)
def _as_held(value: Any, array: Any) -> Any:
    by_type = {
        types.float32: lambda value, array: value,
        types.uint16: lambda value, array: np.uint16(round_bits(value) >> np.uint32(16)),
    }
    return by_type.get(array.dtype)


def load_bf16(stored: Any) -> Any:
    """A value of a bf16 array (in u16) or an f32 one -> the bf16 that it is or is rounded to, as f32."""
    raise NotImplementedError("only in kernels")


def store_bf16(array: Any, row: Any, col: Any, value: Any) -> None:
    """Put an f32, rounded to bf16, into a bf16 array (in u16) or an f32 one."""
    raise NotImplementedError("only in kernels")


@overload(load_bf16, strict=False)
def _load_bf16(stored: Any) -> Any:
    by_type = {
        types.uint16: lambda stored: widen(stored),  # noqa: PLW0108
        types.float32: lambda stored: _round_finite(stored),  # noqa: PLW0108
    }
    return by_type.get(stored)


@overload(store_bf16, strict=False)
def _store_bf16(array: Any, row: Any, col: Any, value: Any) -> Any:
    def store_bits(array: Any, row: Any, col: Any, value: Any) -> None:
        array[row, col] = np.uint16(round_bits(value) >> np.uint32(16))

    def store_float(array: Any, row: Any, col: Any, value: Any) -> None:
        array[row, col] = round_bf16(value)

    return store_bits if array.dtype == types.uint16 else store_float


@inline
def _round_finite(value: Any) -> Any:
    """round_bf16, but infinity and NaN stay what they are."""
    bits = bits_of(value)
    special = np.uint32(bits & MAGNITUDE) >= INFINITE
    return float_of(bits if special else np.uint32(round_bits(value) & np.uint32(0xFFFF0000)))
