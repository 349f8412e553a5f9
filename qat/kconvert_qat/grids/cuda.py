"""Fake quantisation on CUDA: one Triton kernel, bit for bit formats.reference.packed.fake_quantise.

A weight is read once and written once. Every value is served by the convention's rule; only where the values of a group do
not rule it out is it tried whether codes and a scale reproduce them all, and then they stay.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kconvert.formats.conventions import Convention

VALUES = 512  # of a program, which is one warp, where a group is not larger; the fastest of 512 to 8192 on an H200
INFINITE = tl.constexpr(0x7F800000)
SHIFT = tl.constexpr(3.0 * 2**22)  # the last place of numbers of this size is 1


def fake_quantise(groups: torch.Tensor, rule: Convention, served: torch.Tensor) -> None:
    """groups [n, g] bf16 or f32, contiguous -> served, the same."""
    count, size = groups.shape
    padded = triton.next_power_of_2(size)
    rows = max(1, VALUES // padded)
    with torch.cuda.device_of(groups):
        _kernel[(triton.cdiv(count, rows),)](
            groups,
            served,
            count,
            size,
            padded,
            rows,
            rule.divisor,
            float(rule.lowest),
            rule.rounds,
            rule.zero_scale or 1.0,  # under a scale of zero values are so small that by one they become zero as well
            num_warps=min(8, max(1, padded // VALUES)),
            enable_fp_fusion=False,
        )


@triton.jit
def _kernel(
    groups,
    served,
    count,
    size: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    divisor: tl.constexpr,
    lowest: tl.constexpr,
    rounds: tl.constexpr,
    zero_scale: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    col = tl.arange(0, padded)
    place = row[:, None] * size + col[None, :]
    inside = (row < count)[:, None] & (col < size)[None, :]
    values = _round(tl.load(groups + place, inside, 0.0))  # zeros past the end of a group change nothing in it
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    amax = tl.max(magnitude, 1)
    smallest = tl.min(tl.where(magnitude == 0, INFINITE, magnitude), 1).to(tl.float32, bitcast=True)
    largest = amax.to(tl.float32, bitcast=True)
    scale = _round(tl.div_rn(largest, tl.full([rows], divisor, tl.float32)))
    scale = tl.where(scale == 0, zero_scale, scale)
    result = _serve(values, scale, lowest, rounds)
    # Codes from 1 to 8 lie no further apart than this, which few groups do that never were INT4.
    possible = (amax > 0) & (amax < INFINITE) & (largest <= 8 * smallest)
    if tl.max(possible.to(tl.int32), 0) > 0:
        kept = _reproducible(values, bits, largest, possible, lowest)
        result = tl.where(kept[:, None], values, result)
    result = tl.where((amax < INFINITE)[:, None], result, float("nan"))
    tl.store(served + place, result.to(served.dtype.element_ty), inside)


@triton.jit
def _reproducible(values, bits, largest, possible, lowest: tl.constexpr):
    """For which of the possible groups there is a scale that reproduces every value, to the bit.

    If m is the largest magnitude among the codes, then largest = bf16(m * scale): the scale is bf16(largest / m) or next to it.
    """
    found = possible & False
    top = tl.where(tl.max(values, 1) < largest, -lowest, 7)  # -8 has no counterpart above
    candidate = 0
    while (candidate < -3 * lowest) & (tl.max((possible & ~found).to(tl.int32), 0) > 0):
        m = (top - candidate // 3).to(tl.float32)
        offset = candidate % 3 - 3 * (candidate % 3 // 2)  # 0, 1, -1
        scale_bits = tl.div_rn(largest, m).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) + offset
        scale = (scale_bits << 16).to(tl.float32, bitcast=True)
        product = _serve(values, tl.where(scale_bits > 0, scale, 1.0), lowest, False)
        lost = tl.max((product.to(tl.int32, bitcast=True) != bits).to(tl.int32), 1)
        found |= possible & (scale_bits > 0) & (lost == 0)
        candidate += 1
    return found


@triton.jit
def _serve(values, scale, lowest: tl.constexpr, rounds: tl.constexpr):
    """bf16(code * scale) as f32; codes are rounded half to even, by an addition that leaves no place for a fraction."""
    quotient = _divide(values, scale)
    if rounds:
        quotient = _round(quotient)
    codes = (tl.minimum(tl.maximum(quotient, lowest), 7.0) + SHIFT) - SHIFT
    return _round(codes * scale[:, None])


@triton.jit
def _divide(values, scale):
    """values / scale rounded to f32: times the reciprocal, and corrected once by the remainder.

    That is exact for every pair of bf16 mantissas (all were tried); a power of two keeps exponents where nothing is subnormal.
    """
    exponent = tl.maximum(scale.to(tl.int32, bitcast=True) >> 23, 1)
    unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    step = (scale * unit)[:, None]
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    values *= unit[:, None]
    quotient = values * inverse
    return tl.fma(tl.fma(-quotient, step, values), inverse, quotient)


@triton.jit
def _round(values):
    """To bf16, half to even, as f32."""
    return values.to(tl.bfloat16).to(tl.float32)
