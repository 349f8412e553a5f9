"""Fake quantisation on CPUs: for each grid one kernel, that reads a weight and writes what codes and scales make of it.

Bit for bit the format's encoder and then its decoder. Values and what is `served` are both bf16 (in u16), or both f32, whose
values are rounded to bf16 first. A group or block with a value that is not finite becomes NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels import fp8 as e4m3
from kconvert.formats.kernels import mx, nvfp4
from kconvert.formats.kernels.bits import (
    INFINITE,
    MAGNITUDE,
    float_of,
    inline,
    load_bf16,
    power,
    round_bf16,
    round_bits,
    smallest_bits,
    store_bf16,
)
from kconvert.formats.kernels.bits import bits_of as number_bits
from kconvert.formats.kernels.packed import HIGHEST, SHIFT, exact_scale, may_be_exact, rule, shifted, step_of
from kconvert_qat.grids import vectors
from kconvert_qat.grids.vectors import (
    bits_of,
    floats_of,
    kernel,
    larger,
    load,
    load_normal,
    smaller,
    store_exact,
    store_normal,
)

U = np.uint32
LANES = 32  # two of the vectors that AVX-512 has; a group of bf16 values fills one
STAGED = 64  # groups
KEPT = np.float32(0)  # in the place of a step
NORMAL = np.float32(2.0**-125)  # steps from here on have no code, nor half of one, that is a subnormal number
NEVER = np.float32(np.inf)
NAN = np.float32(np.nan)
# Quotients of two bf16 that are not halfway between two codes are further from that than 2^-10. So the error of a reciprocal
# does no harm to what is rounded to 2^-13, by adding this, which leaves no place for more.
SNAP = np.float32(1536)
TO_SHIFT = np.float32(SHIFT - SNAP)
# The same to a few last places, where the quotient is rounded to bf16 first; the nearest is 2^-17 of it away from a half.
HALF_SNAP, SNAPPED = U(4), U(0xFFFFFFF8)
SIGN = U(0x80000000)
MX_GROUP, NV_GROUP = 32, 16
E2M1_HIGHEST, E4M3_HIGHEST = np.float32(6), np.float32(448)
FP8_NORMAL = np.float32(2.0**-116)  # times the smallest code, 2^-9, that is NORMAL


@inline
def _rounded(bits: Any) -> Any:
    """Bits of f32 -> bits of the bf16 that it is rounded to; of what is not finite, no number either."""
    return U(round_bits(float_of(bits)) & U(0xFFFF0000)) if bits < INFINITE else bits


@inline
def _extremes(values: Any, group: Any, whole: Any) -> Any:
    """Bits of the largest magnitude of a group, and of the smallest that is not zero, or one that becomes zero as bf16; 0 for
    none. `whole`: the group is so many LANES."""
    most, before = U(0), U(0xFFFFFFFF)
    if whole:
        for i in range(0, values.shape[1], LANES):
            most = U(max(most, vectors.largest(values, group, i, LANES)))
            before = U(min(before, U(vectors.smallest(values, group, i, LANES) - U(1))))
        return _rounded(most), _rounded(U(before + U(1)))
    for i in range(values.shape[1]):
        magnitude = U(number_bits(load_bf16(values[group, i])) & MAGNITUDE)
        less = U(magnitude - U(1))
        most = magnitude if magnitude > most else most
        before = less if less < before else before
    return most, U(before + U(1))


@inline
def _is_candidate(amax: Any, smallest: Any) -> Any:
    """Whether it is worth trying to keep a group with these extremes."""
    return amax < INFINITE and (may_be_exact(amax, smallest) or smallest == U(0))


@inline
def _keep(values: Any, group: Any, amax: Any, lowest: Any, tile: Any, codes: Any, served: Any) -> Any:
    """Whether INT4's codes and a scale reproduce the group; then it is served as it is."""
    for i in range(values.shape[1]):
        tile[0, i] = load_bf16(values[group, i])
    if not may_be_exact(amax, smallest_bits(tile, 0)) or not exact_scale(tile, 0, amax, lowest, codes):
        return False
    for i in range(values.shape[1]):
        store_bf16(served, group, i, tile[0, i])
    return True


@inline
def _serve_int4(values: Any, group: Any, step: Any, lowest: Any, rounds: Any, clamps: Any, served: Any) -> None:
    """Under a step from NORMAL on; of LANES values at a time. See packed.shifted."""
    inverse = np.float32(1) / step
    for i in range(0, values.shape[1], LANES):
        quotient = load_normal(values, group, i, LANES) * inverse
        if rounds:
            quotient = vectors.rounded(floats_of((bits_of(quotient) + HALF_SNAP) & SNAPPED))
        if clamps:
            quotient = smaller(larger(quotient, lowest), HIGHEST)
        code = quotient + SNAP + TO_SHIFT - SHIFT
        store_normal(served, group, i, code * step)


@kernel
def int4(values: Any, divisor: Any, lowest: Any, rounds: Any, zero_scale: Any, served: Any) -> None:
    """Values [groups, g]. Several groups go through each stage together: one need not wait for the scale of the next."""
    size = values.shape[1]
    whole, clamps = size % LANES == 0, divisor > HIGHEST  # amax / step is near the divisor
    tile, codes = np.empty((1, size), np.float32), np.empty(size, np.uint8)
    amax, smallest, steps = np.empty(STAGED, np.uint32), np.empty(STAGED, np.uint32), np.empty(STAGED, np.float32)
    fast = NORMAL if whole else NEVER
    for first in range(0, values.shape[0], STAGED):
        count = min(STAGED, values.shape[0] - first)
        for k in range(count):
            amax[k], smallest[k] = _extremes(values, first + k, whole)
        candidates = 0
        for k in range(count):
            steps[k] = step_of(rule(amax[k], divisor, zero_scale)) if amax[k] < INFINITE else NAN
            candidates += _is_candidate(amax[k], smallest[k])
        for k in range(count if candidates else 0):
            is_candidate = _is_candidate(amax[k], smallest[k])
            if is_candidate and _keep(values, first + k, amax[k], lowest, tile, codes, served):
                steps[k] = KEPT
        for k in range(count):
            if steps[k] >= fast:
                _serve_int4(values, first + k, steps[k], lowest, rounds, clamps, served)
            elif steps[k] != KEPT:
                for i in range(size):
                    code = shifted(load_bf16(values[first + k, i]), steps[k], lowest, rounds) - SHIFT
                    store_bf16(served, first + k, i, code * steps[k])


@inline
def _fill(served: Any, row: Any, left: Any, right: Any) -> None:
    """With NaN."""
    for i in range(left, right):
        store_bf16(served, row, i, NAN)


@inline
def _rounded_to(quotients: Any, highest: Any, lowest_binade: Any, to_magic: Any) -> Any:
    """Magnitudes -> the nearest code, half to even; see formats.kernels.mx.round_e2m1 and fp8.round_e4m3."""
    quotients = smaller(quotients, highest)
    magic = floats_of(larger(bits_of(quotients) & INFINITE, lowest_binade) + to_magic)
    return quotients + magic - magic


@inline
def _signs(values: Any, quotients: Any) -> Any:
    """Bits of the signs of values, but not where the quotient is 0: there e2m1 has -0 only if the whole group comes back."""
    return bits_of(values) & (bits_of(quotients) + MAGNITUDE) & SIGN


@kernel
def mxfp4(values: Any, served: Any) -> None:
    """Values [groups, 32]. Every product is a bf16."""
    for group in range(values.shape[0]):
        amax = _rounded(vectors.largest(values, group, 0, MX_GROUP))
        if amax >= INFINITE:
            _fill(served, group, 0, MX_GROUP)
            continue
        exponent = mx.mx_exponent(amax, 2)
        given = load(values, group, 0, MX_GROUP)
        magnitudes = bits_of(given) & MAGNITUDE
        quotients = floats_of(magnitudes) * power(U(U(254) - exponent))
        products = bits_of(_rounded_to(quotients, E2M1_HIGHEST, mx.ONE, mx.TO_MAGIC) * power(exponent))
        if vectors.union(products ^ magnitudes):
            given = floats_of(products | _signs(given, quotients))
        store_exact(served, group, 0, given)


@kernel
def reach(values: Any) -> Any:
    """Of values [groups, 16] the bits of the largest finite magnitude, rounded to bf16."""
    most = U(0)
    for group in range(values.shape[0]):
        amax = vectors.largest(values, group, 0, NV_GROUP)
        if amax < INFINITE:
            most = U(max(most, amax))
            continue
        for i in range(NV_GROUP):
            one = vectors.largest(values, group, i, 1)
            most = U(max(most, one)) if one < INFINITE else most
    return _rounded(most)


@kernel
def nvfp4_by(unit: Any, values: Any, served: Any) -> None:
    """Values [groups, 16] of a matrix with this global factor. A product that is a normal number is a bf16."""
    tile = np.empty((1, NV_GROUP), np.float32)
    for group in range(values.shape[0]):
        amax = _rounded(vectors.largest(values, group, 0, NV_GROUP))
        if amax >= INFINITE:
            _fill(served, group, 0, NV_GROUP)
            continue
        given = load(values, group, 0, NV_GROUP)
        magnitudes = bits_of(given) & MAGNITUDE
        if amax < nvfp4.NORMAL or not U(vectors.union(magnitudes) & nvfp4.SURPLUS):
            store_exact(tile, 0, 0, given)
            if nvfp4.found_scale(tile, 0, amax, unit):
                store_exact(served, group, 0, given)
                continue
        step = e4m3.widen_e4m3(nvfp4.rule_scale(amax, unit)) * unit
        if step >= NORMAL:
            quotients = floats_of(magnitudes) / step
            products = _rounded_to(quotients, E2M1_HIGHEST, mx.ONE, mx.TO_MAGIC) * step
            store_exact(served, group, 0, floats_of(bits_of(products) | _signs(given, quotients)))
        else:
            for i in range(NV_GROUP):
                code = mx.round_e2m1(load_bf16(values[group, i]) / step)
                store_bf16(served, group, i, mx.widen_e2m1(code) * step)


@kernel
def fp8(values: Any, size: Any, powers: Any, served: Any) -> None:
    """Values [rows, cols], with a scale for each block of `size` x `size`; row by row, as in formats.kernels.fp8."""
    rows, cols = values.shape
    amax = np.empty(-(-cols // size), np.uint32)
    steps = np.empty(amax.shape[0], np.float32)
    for first in range(0, rows, size):
        last = min(first + size, rows)
        amax[:] = U(0)
        for row in range(first, last):
            for block in range(amax.shape[0]):
                amax[block] = max(amax[block], _amax_of(values, row, block * size, min((block + 1) * size, cols)))
        for block in range(amax.shape[0]):
            steps[block] = _block_step(_rounded(amax[block]), powers)
        for row in range(first, last):
            for block in range(amax.shape[0]):
                _serve_fp8(values, row, block * size, min((block + 1) * size, cols), steps[block], powers, served)


@inline
def _amax_of(values: Any, row: Any, left: Any, right: Any) -> Any:
    """Bits of the largest magnitude in a part of a row, as it is stored."""
    amax, whole = U(0), left + (right - left) // LANES * LANES
    for i in range(left, whole, LANES):
        amax = U(max(amax, vectors.largest(values, row, i, LANES)))
    for i in range(whole, right):
        amax = U(max(amax, vectors.largest(values, row, i, 1)))
    return amax


@inline
def _block_step(amax: Any, powers: Any) -> Any:
    if amax >= INFINITE:
        return NAN
    return power(U(e4m3.block_exponent(amax))) if powers else e4m3.block_step(float_of(amax), E4M3_HIGHEST, False)


@inline
def _serve_fp8(values: Any, row: Any, left: Any, right: Any, step: Any, powers: Any, served: Any) -> None:
    """Under a step of NaN everything becomes that."""
    whole = left + (right - left) // LANES * LANES if step >= FP8_NORMAL else left
    inverse = np.float32(1) / step
    for i in range(left, whole, LANES):
        given = load_normal(values, row, i, LANES)
        magnitudes = floats_of(bits_of(given) & MAGNITUDE)
        quotients = magnitudes * inverse if powers else magnitudes / step
        codes = _rounded_to(quotients, E4M3_HIGHEST, e4m3.SMALLEST_BINADE, e4m3.TO_MAGIC)
        store_normal(served, row, i, floats_of(bits_of(codes * step) | (bits_of(given) & SIGN)))
    if step != step:  # noqa: PLR0124 (NaN)
        _fill(served, row, left, right)
        return
    for i in range(whole, right):
        code = e4m3.round_e4m3(load_bf16(values[row, i]) / step)
        store_bf16(served, row, i, round_bf16(e4m3.widen_e4m3(code) * step))


@kernel
def nh(words: Any, keys: Any, found: Any) -> None:
    """Words u32 [blocks, 2, n] and keys u32 [2, n + 1] -> u64 [blocks, 2]: sums of (word + key) * (word + key) of a pair, each
    factor modulo 2^32; the second with the keys of the next pair."""
    for block in range(words.shape[0]):
        one, other = np.uint64(0), np.uint64(0)
        for i in range(words.shape[2]):
            left, right = words[block, 0, i], words[block, 1, i]
            one += np.uint64(U(left + keys[0, i])) * np.uint64(U(right + keys[1, i]))
            other += np.uint64(U(left + keys[0, i + 1])) * np.uint64(U(right + keys[1, i + 1]))
        found[block, 0], found[block, 1] = one, other
