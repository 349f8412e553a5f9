"""Microscaling floats; see formats.mx."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from kconvert.formats.kernels.bits import (
    INFINITE,
    MAGNITUDE,
    amax_bits,
    as_held,
    bits_of,
    error_places,
    error_unit,
    float_of,
    inline,
    kernel,
    local,
    pack_pairs,
    power,
    round_bf16,
    squared_error,
)
from kconvert.formats.kernels.fp8 import SMALLEST_BINADE as ONE_E4M3
from kconvert.formats.kernels.fp8 import TO_MAGIC as TO_MAGIC_E4M3
from kconvert.formats.kernels.fp8 import round_e4m3, widen_e4m3

U = np.uint32  # around every operation on u32, which numba would otherwise widen to 64 bits
GROUP = 32
FRACTION = U(0x7FFFFF)
FRACTION_OF_448 = U(0x600000)
ONE = U(127 << 23)  # 1 as f32
HALF = U(126 << 23)  # 0.5 as f32, which is code 1
SIX = U(0x40C00000)  # 6 as f32, the largest e2m1
TO_MAGIC = U(22 << 23)  # adding 2**22 times the binade leaves steps of half the binade
REBIAS = U(126 << 23)  # exponent bias of f32 less that of e2m1


@inline
def widen_e2m1(code: Any) -> Any:
    """u8 nibble -> f32, exact, by no subnormal number: where code 1 were one, Intel's cores take twenty times as long."""
    size = U(code & np.uint8(7))
    bits = U(U(size << U(22)) + REBIAS) if size > U(1) else U(size * HALF)
    return float_of(U(bits | U(U(code & np.uint8(8)) << U(28))))


@inline
def round_e2m1(value: Any) -> Any:
    """f32 -> u8 nibble, the nearest e2m1, half to even, saturating at 6; zeros of either sign become +0; not for NaN.

    The addition of `magic` does the rounding: a sum's lowest bit is worth one step of e2m1 in the value's binade.
    """
    bits = bits_of(value)
    magnitude = U(min(U(bits & MAGNITUDE), SIX))
    binade = U(max(U(magnitude & INFINITE), ONE))
    magic = U(binade + TO_MAGIC)
    steps = U(bits_of(float_of(magnitude) + float_of(magic)) - magic)
    sign = U(8) if value < np.float32(0) else U(0)
    return np.uint8(U(U(steps + U(U(binade - ONE) >> U(22))) | sign))


@inline
def mx_exponent(amax: Any, largest: Any) -> Any:
    """The biased exponent of a scale, from the bits of amax; `largest` is the exponent of the largest code."""
    rounded = min(np.int32(U(amax + U(1 << 21)) >> U(23)), np.int32(254))  # one more would be infinite
    return U(max(rounded - np.int32(largest), np.int32(0)))


@kernel
def decode_mxfp4(packed: Any, scale: Any, tile: Any) -> None:
    """packed u8 [groups, 16], scale u8 [groups] -> tile f32 or bf16 [groups, 32]; the products are exact in bf16."""
    for group in range(tile.shape[0]):
        step = power(scale[group])
        for j in range(packed.shape[1]):
            byte = packed[group, j]
            tile[group, 2 * j] = as_held(widen_e2m1(byte) * step, tile)
            tile[group, 2 * j + 1] = as_held(widen_e2m1(np.uint8(byte >> np.uint8(4))) * step, tile)


@kernel
def decode_mxfp8(codes: Any, scale: Any, tile: Any) -> None:
    """codes u8 [groups, 32], scale u8 [groups] -> tile f32 or bf16 [groups, 32] = bf16(e4m3 * 2 ** (scale - 127))."""
    for group in range(tile.shape[0]):
        step = power(scale[group])
        for i in range(tile.shape[1]):
            tile[group, i] = as_held(round_bf16(widen_e4m3(codes[group, i]) * step), tile)


@inline
def _error(tile: Any, group: Any, exponent: Any, bits: Any, unit: Any) -> Any:
    """The group's squared error under a scale, see bits.squared_error."""
    step, inverse = power(exponent), power(U(U(254) - exponent))
    error, places = np.int32(0), error_places(tile.shape[1])
    for i in range(tile.shape[1]):
        value = tile[group, i]
        quotient = value * inverse
        served = widen_e2m1(round_e2m1(quotient)) if bits == 4 else widen_e4m3(round_e4m3(quotient))
        error = np.int32(error + squared_error(value, round_bf16(served * step), unit, places))
    return error


@inline
def _exponent(tile: Any, group: Any, amax: Any, bits: Any, search: Any) -> Any:
    """The group's exponent by the rule, or if `search`, the one of it and its neighbours that has the least squared error."""
    best = mx_exponent(amax, 2 if bits == 4 else 8)
    if search:
        unit = error_unit(amax)
        least = _error(tile, group, best, bits, unit)
        rule = np.int32(best)
        for other in (rule - np.int32(1), rule + np.int32(1)):
            if other < 0 or other > 254 - (2 if bits == 4 else 8):
                continue
            error = _error(tile, group, U(other), bits, unit)
            if error < least:
                best, least = U(other), error
    return best


@kernel
def encode_mxfp4(tile: Any, search: Any, packed: Any, scale: Any) -> Any:
    """tile f32 [groups, 32] -> packed u8 [groups, 16], scale u8 [groups]; -1 at a value that is not finite, else 0."""
    codes = carray(local(GROUP), GROUP, np.uint8)
    for group in range(tile.shape[0]):
        amax = amax_bits(tile, group)
        if amax >= INFINITE:
            return -1
        exponent = _exponent(tile, group, amax, 4, search)
        scale[group] = np.uint8(exponent)
        inverse = power(U(U(254) - exponent))
        for i in range(tile.shape[1]):
            codes[i] = round_e2m1(tile[group, i] * inverse)
        pack_pairs(codes, group, packed)
    return 0


@kernel
def encode_mxfp8(tile: Any, search: Any, codes: Any, scale: Any) -> Any:
    """tile f32 [groups, 32] -> codes u8 [groups, 32], scale u8 [groups]; -1 at a value that is not finite, else 0."""
    for group in range(tile.shape[0]):
        amax = amax_bits(tile, group)
        if amax >= INFINITE:
            return -1
        exponent = _exponent(tile, group, amax, 8, search)
        scale[group] = np.uint8(exponent)
        inverse = power(U(U(254) - exponent))
        for i in range(tile.shape[1]):
            codes[group, i] = round_e4m3(tile[group, i] * inverse)
    return 0


@inline
def _is_lost(tile: Any, group: Any, exponent: Any, bits: Any) -> Any:
    """Whether the group has a value that is no code of e2m1 or e4m3 times this scale, -0 aside.

    The rounding is that of round_e2m1 and round_e4m3, halfway through which is what the code stands for.
    """
    step, inverse = power(exponent), power(U(U(254) - exponent))
    largest = np.float32(6) if bits == 4 else np.float32(448)
    lowest, to_magic = (ONE, TO_MAGIC) if bits == 4 else (ONE_E4M3, TO_MAGIC_E4M3)
    differ = U(0)
    for i in range(tile.shape[1]):
        magnitude = U(bits_of(tile[group, i]) & MAGNITUDE)
        quotient = min(float_of(magnitude) * inverse, largest)
        magic = float_of(U(max(U(bits_of(quotient) & INFINITE), lowest) + to_magic))
        differ = U(differ | U(bits_of((quotient + magic - magic) * step) ^ magnitude))
    return differ != U(0)


@kernel
def mend_mxfp4(tile: Any, packed: Any, scale: Any) -> Any:
    """How many groups of the tile do not come back from what encode_mxfp4 made of them; in the others -0 does now, too."""
    inexact = 0
    for group in range(tile.shape[0]):
        if _is_lost(tile, group, U(scale[group]), 4):
            inexact += 1
            continue
        for j in range(packed.shape[1]):
            low = U(U(bits_of(tile[group, 2 * j]) >> U(28)) & U(8))
            high = U(U(bits_of(tile[group, 2 * j + 1]) >> U(24)) & U(0x80))
            packed[group, j] |= np.uint8(low | high)
    return inexact


@kernel
def mend_mxfp8(tile: Any, codes: Any, scale: Any) -> Any:
    """How many groups of the tile do not come back from what encode_mxfp8 made of them.

    Those that do from half of the scale get that: the rule does not use the largest code, 448.
    """
    inexact = 0
    for group in range(tile.shape[0]):
        exponent = U(scale[group])
        if not _is_lost(tile, group, exponent, 8):
            continue
        half = U(exponent - U(1))
        if exponent and U(amax_bits(tile, group) & FRACTION) == FRACTION_OF_448 and not _is_lost(tile, group, half, 8):
            scale[group] = np.uint8(half)
            inverse = power(U(U(254) - half))
            for i in range(tile.shape[1]):
                codes[group, i] = round_e4m3(tile[group, i] * inverse)
        else:
            inexact += 1
    return inexact
