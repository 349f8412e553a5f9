"""NVFP4; see formats.nvfp4."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from kconvert.formats.conventions import NVFP4_STEPS
from kconvert.formats.kernels.bits import (
    INFINITE,
    MAGNITUDE,
    address,
    amax_bits,
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
from kconvert.formats.kernels.fp8 import round_e4m3, widen_e4m3
from kconvert.formats.kernels.mx import round_e2m1, widen_e2m1

U = np.uint32  # around every operation on u32, which numba would otherwise widen to 64 bits
DOUBLED = U(0xC8643210)  # the magnitudes of e2m1 times two, a nibble each
SURPLUS = U(0x3FFFF)  # the bits of an f32 that are 0 in a product of e2m1, e4m3 and a power of two
NORMAL = U(5 << 23)  # a twelfth of such a number is none of the subnormal ones
LARGEST = np.uint8(0x7E)  # 448 as e4m3
GROUP = 16
LOWEST, HIGHEST = -9, 8  # powers of two that e4m3 has
OVERFLOWING = np.uint8(253)  # the first exponent of e8m0 whose product with the largest e2m1 no F32 has


@inline
def _value(code: Any, step: Any) -> Any:
    """bf16(e2m1 * step) of the low nibble. A word of four bits for each doubled magnitude spares vectors a table."""
    doubled = U(U(DOUBLED >> U(U(code & np.uint8(7)) << U(2))) & U(15))
    rounded = round_bf16(np.float32(np.int32(doubled)) * np.float32(0.5) * step)
    return float_of(U(bits_of(rounded) ^ U(U(code & np.uint8(8)) << U(28))))


@kernel
def steps_of(global_scale: Any, multiplies: Any, steps: Any) -> None:
    """steps f32 [256]: what a code is multiplied by, for each scale."""
    for code in range(256):
        wide = widen_e4m3(np.uint8(code))
        steps[code] = wide * global_scale if multiplies else wide / global_scale


@kernel
def decode_nvfp4(packed: Any, scale: Any, global_scale: Any, multiplies: Any, tile: Any) -> None:
    """packed u8 [groups * 8], scale u8 [groups] of e4m3 bits, f32 -> tile f32 [groups * 16] = bf16(e2m1 * step).

    step is scale * global scale if it `multiplies`, else scale / global scale. Groups go in pairs, whose bytes fill a vector.
    """
    steps = carray(local(1024), 256, np.float32)
    steps_of(global_scale, multiplies, steps)
    pairs = scale.shape[0] // 2
    for pair in range(pairs):
        one, other = steps[scale[2 * pair]], steps[scale[2 * pair + 1]]
        for j in range(16):
            byte = packed[16 * pair + j]
            step = one if j < 8 else other
            tile[32 * pair + 2 * j] = _value(byte, step)
            tile[32 * pair + 2 * j + 1] = _value(np.uint8(byte >> np.uint8(4)), step)
    for j in range(16 * pairs, packed.shape[0]):
        step = steps[scale[j >> 3]]
        tile[2 * j] = _value(packed[j], step)
        tile[2 * j + 1] = _value(np.uint8(packed[j] >> np.uint8(4)), step)


@inline
def rule_scale(amax: Any, unit: Any) -> Any:
    """The scale, an e4m3, of a group with this amax (its bits); never zero."""
    return max(round_e4m3(float_of(amax) / (np.float32(6) * unit)), np.uint8(1))


@inline
def _error(tile: Any, group: Any, step: Any, error: Any) -> Any:
    """The group's squared error under a step, see bits.squared_error; `error` is its unit."""
    total, places = np.int32(0), error_places(GROUP)
    for i in range(GROUP):
        value = tile[group, i]
        served = round_bf16(widen_e2m1(round_e2m1(value / step)) * step)
        total = np.int32(total + squared_error(value, served, error, places))
    return total


@inline
def _search(tile: Any, group: Any, amax: Any, rule: Any, unit: Any) -> Any:
    """Of the rule's scale and those some steps of e4m3 from it, the first that has the least squared error."""
    in_amax = error_unit(amax)
    best, least = rule, _error(tile, group, widen_e4m3(rule) * unit, in_amax)
    for step in NVFP4_STEPS:
        other = np.int32(rule) + np.int32(step)
        if other < 1 or other > np.int32(LARGEST):
            continue
        error = _error(tile, group, widen_e4m3(np.uint8(other)) * unit, in_amax)
        if error < least:
            best, least = np.uint8(other), error
    return best


@inline
def _comes_back(tile: Any, group: Any, step: Any) -> Any:
    """Whether every value of the group is that of a code under this step, -0 aside."""
    differ = U(0)
    for i in range(GROUP):
        magnitude = float_of(U(bits_of(tile[group, i]) & MAGNITUDE))
        served = round_bf16(widen_e2m1(round_e2m1(magnitude / step)) * step)
        differ = U(differ | U(bits_of(served) ^ bits_of(magnitude)))
    return differ == U(0)


@inline
def found_scale(tile: Any, group: Any, amax: Any, unit: Any) -> Any:
    """The scale, an e4m3, under which the group comes back, the smallest; 0 where there is none."""
    if amax == U(0):
        return np.uint8(1)
    surplus = U(0)
    for i in range(GROUP):
        surplus = U(surplus | bits_of(tile[group, i]))
    if U(surplus & SURPLUS) and amax >= NORMAL:
        return np.uint8(0)
    for doubled in (12, 8, 6, 4, 3, 2, 1):  # twice the code that amax has
        wanted = float_of(amax) / (np.float32(0.5) * np.float32(doubled) * unit)
        code = round_e4m3(wanted)
        if code and widen_e4m3(code) == wanted and _comes_back(tile, group, wanted * unit):
            return code
    return np.uint8(0)


@inline
def _encode_group(
    tile: Any, group: Any, unit: Any, exact: Any, search: Any, codes: Any, packed: Any, row: Any, scale: Any
) -> Any:
    """tile[group] f32 [16] -> packed[row] u8 [8], scale[row] u8; whether it does not come back, -1 where it is not finite.

    `codes` u8 [16] is room. Zeros of a group that was found again keep their sign.
    """
    amax = amax_bits(tile, group)
    if amax >= INFINITE:
        return -1
    code = found_scale(tile, group, amax, unit) if exact else np.uint8(0)
    lost = code == np.uint8(0)
    if lost:
        code = rule_scale(amax, unit)
        code = _search(tile, group, amax, code, unit) if search else code
    scale[row] = code
    step = widen_e4m3(code) * unit
    for i in range(GROUP):
        sign = U(0) if lost else U(U(bits_of(tile[group, i]) >> U(28)) & U(8))
        codes[i] = np.uint8(round_e2m1(tile[group, i] / step) | sign)
    pack_pairs(codes, row, packed)
    return 1 if lost else 0


@kernel
def encode_nvfp4(tile: Any, unit: Any, exact: Any, search: Any, packed: Any, scale: Any) -> Any:
    """tile f32 [groups, 16] -> packed u8 [groups, 8], scale u8 [groups] of e4m3 bits, for a global factor f32.

    Returns how many groups were not found again where they were to be (`exact`), -1 at a value that is not finite.
    """
    lost = 0
    nibbles = carray(local(16), GROUP, np.uint8)
    for group in range(tile.shape[0]):
        fault = _encode_group(tile, group, unit, exact, search, nibbles, packed, group, scale)
        if fault < 0:
            return -1
        lost += fault
    return lost


@inline
def _is_infinite(codes: Any, step: Any) -> Any:
    """Whether bf16(e2m1 * step) of any of these u8 [bytes] is."""
    for byte in codes:
        for nibble in (byte, np.uint8(byte >> np.uint8(4))):
            if U(bits_of(round_bf16(widen_e2m1(nibble) * step)) & INFINITE) == INFINITE:
                return True
    return False


@kernel
def encode_mxfp4(codes: Any, exponents: Any, unit: Any, packed: Any, scale: Any) -> Any:
    """MXFP4's codes u8 [groups, 16] and exponents u8 [groups] -> scale u8 [groups, 2], beside packed u8 [groups, 16], which has
    the codes already.

    Each scale is there twice where e4m3 has it, a multiple of the power of two `unit`; else the group gets others, and codes of
    its own. Returns how many groups of 16 have other values than they had, -1 where a value is not finite.
    """
    lost = 0
    known = carray(local(256), 256, np.uint8)
    _scales(np.int32(U(bits_of(unit) >> U(23))), known)
    tile, nibbles = carray(local(128), (2, GROUP), np.float32), carray(local(16), GROUP, np.uint8)
    count = codes.shape[0]
    halves, scales = carray(address(packed), (2 * count, 8), np.uint8), carray(address(scale), 2 * count, np.uint8)
    for group in range(codes.shape[0]):
        code = known[exponents[group]]
        if code:
            scale[group, 0] = scale[group, 1] = code
            if exponents[group] < OVERFLOWING:
                continue
        step = power(exponents[group])
        if exponents[group] >= OVERFLOWING and _is_infinite(codes[group], step):
            return -1
        if code:
            continue
        for i in range(GROUP):
            byte = codes[group, i]
            tile[i >> 3, 2 * (i & 7)] = widen_e2m1(byte) * step
            tile[i >> 3, 2 * (i & 7) + 1] = widen_e2m1(np.uint8(byte >> np.uint8(4))) * step
        for half in range(2):
            lost += _encode_group(tile, half, unit, True, False, nibbles, halves, 2 * group + half, scales)
    return lost


@inline
def _scales(whole: Any, known: Any) -> None:
    """known u8 [256]: for each exponent of e8m0, less `whole`, what e4m3 has for it; 0 for nothing."""
    known[:] = np.uint8(0)
    for number in range(256):
        exponent = np.int32(number) - whole
        if LOWEST <= exponent <= HIGHEST:
            known[number] = np.int32(1) << (exponent + np.int32(9)) if exponent < -6 else (exponent + 7) << 3


@kernel
def count_changed(packed: Any, scale: Any, before: Any, after: Any) -> Any:
    """How many groups of packed u8 [groups, 8], scale u8 [groups] have other values by the steps `after` than by those
    `before`, f32 [256] each, one for each scale."""
    changed = carray(local(4096), (256, 16), np.bool_)
    for code in range(256):
        for nibble in range(16):
            old, new = _value(np.uint8(nibble), before[code]), _value(np.uint8(nibble), after[code])
            changed[code, nibble] = bits_of(old) != bits_of(new)
    count = 0
    for group in range(scale.shape[0]):
        of_scale, found = changed[scale[group]], False
        for j in range(8):
            byte = packed[group, j]
            found |= of_scale[byte & np.uint8(15)] | of_scale[byte >> np.uint8(4)]
        count += found
    return count
