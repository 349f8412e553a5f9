"""MXFP4, NVFP4 and block FP8 on CUDA: Triton kernels, bit for bit the references of kconvert.formats.

Each reads a weight once and writes it once. Codes are never made: what they stand for is rounded to in F32, where sums and
products with powers of two are exact, and a group or a block with a value that is not finite becomes NaN. Nothing waits for
the device.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kconvert.formats.conventions import CONVENTIONS
from kconvert_qat.grids.cuda import INFINITE, SHIFT, VALUES, _round
from kconvert_qat.grids.cuda import fake_quantise as int4
from kconvert_qat.grids.table import BLOCK, POWERS

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
MX_GROUP, NV_GROUP = 32, 16
REACHED = 4096  # values of a program that looks for the largest


def fake_quantise(
    weight: torch.Tensor, group_size: int, convention: str, grid: str, mate: torch.Tensor | None, served: torch.Tensor
) -> None:
    """[..., rows, cols] bf16 or f32, contiguous -> served, the same, on any of the grids; see grid.fake_quantise."""
    if not weight.numel():
        return
    if grid == "int4":
        int4(weight.view(-1, group_size), CONVENTIONS[convention], served.view(-1, group_size))
    elif grid == "mxfp4":
        mxfp4(weight, served)
    elif grid == "nvfp4":
        nvfp4(weight, mate, served)
    else:
        fp8(weight, (BLOCK, group_size), convention == POWERS, served)


def mxfp4(weight: torch.Tensor, served: torch.Tensor) -> None:
    """[..., 32 * n] bf16 or f32, contiguous -> served, the same; by formats.reference.mx.encode with `exact`."""
    count = weight.numel() // MX_GROUP
    rows = VALUES // MX_GROUP
    with torch.cuda.device_of(weight):
        _mxfp4[(triton.cdiv(count, rows),)](weight, served, count, MX_GROUP, rows, num_warps=1, enable_fp_fusion=False)


def nvfp4(weight: torch.Tensor, mate: torch.Tensor | None, served: torch.Tensor) -> None:
    """[..., rows, 16 * n] bf16 or f32, contiguous -> served, the same; by formats.reference.nvfp4.fake_quantise."""
    matrices = weight.view(-1, *(weight.shape[-2:] if weight.dim() > 1 else (1, *weight.shape)))
    reaches = _reaches(matrices)
    if mate is not None:
        reaches = torch.maximum(reaches, _reaches(mate.detach().contiguous().view(1, *mate.shape[-2:])))
    count = weight.numel() // NV_GROUP
    rows = VALUES // NV_GROUP
    with torch.cuda.device_of(weight):
        _nvfp4[(triton.cdiv(count, rows),)](
            weight,
            served,
            reaches,
            count,
            matrices[0].numel() // NV_GROUP,
            NV_GROUP,
            rows,
            num_warps=1,
            enable_fp_fusion=False,
        )


def fp8(weight: torch.Tensor, block: tuple[int, int], powers: bool, served: torch.Tensor) -> None:
    """[..., rows, cols] bf16 or f32, contiguous -> served, the same; by formats.reference.fp8.encode."""
    rows, cols = weight.shape[-2:] if weight.dim() > 1 else (1, *weight.shape)
    down, across = triton.cdiv(rows, block[0]), triton.cdiv(cols, block[1])
    with torch.cuda.device_of(weight):
        _fp8[(weight.numel() // (rows * cols) * down * across,)](
            weight, served, rows, cols, *block, powers, num_warps=8, enable_fp_fusion=False
        )


def _reaches(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, cols] -> int32 [n], the bits in f32 of the largest finite magnitude of each as bf16."""
    found = torch.zeros(len(matrices), dtype=torch.int32, device=matrices.device)
    size = matrices[0].numel()
    with torch.cuda.device_of(matrices):
        _largest[(len(matrices), triton.cdiv(size, REACHED))](matrices, found, size, REACHED)
    return found


@triton.jit
def _largest(matrices, found, size, count: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * count + tl.arange(0, count)
    values = _round(tl.load(matrices + matrix * size + place, place < size, 0.0))
    magnitude = values.to(tl.int32, bitcast=True) & MAGNITUDE
    tl.atomic_max(found + matrix, tl.max(tl.where(magnitude < INFINITE, magnitude, 0), 0))


@triton.jit
def _mxfp4(weight, served, count, size: tl.constexpr, rows: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    place = row[:, None] * size + tl.arange(0, size)[None, :]
    inside = (row < count)[:, None] & (place >= 0)
    values = _round(tl.load(weight + place, inside, 0.0))
    amax = tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, 1)
    # The exponent of amax, rounded up from a mantissa of 1.75, less two; with 127 added, as it is stored.
    power = tl.minimum((amax >> 23) + ((amax & 0x7FFFFF) >= 0x600000).to(tl.int32), 254) - 2
    power = tl.maximum(power, 0)
    inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
    result = _e2m1(values * inverse[:, None]) * _power_of_two(power)[:, None]
    kept = tl.min((result == values).to(tl.int32), 1) > 0  # with the signs of its zeros
    result = tl.where(kept[:, None], values, result)
    result = tl.where((amax < INFINITE)[:, None], result, float("nan"))
    tl.store(served + place, result.to(served.dtype.element_ty), inside)


@triton.jit
def _nvfp4(weight, served, reaches, count, in_matrix, size: tl.constexpr, rows: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    place = row[:, None] * size + tl.arange(0, size)[None, :]
    inside = (row < count)[:, None] & (place >= 0)
    values = _round(tl.load(weight + place, inside, 0.0))
    reach = tl.load(reaches + row // in_matrix, row < count, 0)
    exponent = tl.minimum(tl.maximum((reach >> 23) - 10, 1), 253)  # of 2^e in the largest 2^(e - 10)
    factor = tl.where(reach == 0, 127 << 23, exponent << 23).to(tl.float32, bitcast=True)
    bits = tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, 1)
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(_e4m3(tl.minimum(tl.div_rn(amax, 6.0 * factor), 448.0)), 0.001953125)
    result = _by_step(values, scale * factor)
    kept = bits == 0
    for code in tl.static_range(1, 8):  # half of 1, 2, 3, 4, 6, 8, 12
        twice = code if code < 5 else (6 if code == 5 else (8 if code == 6 else 12))
        wanted = tl.div_rn(amax, (0.5 * twice) * factor)
        scale = _e4m3(tl.minimum(wanted, 448.0))
        sound = (scale == wanted) & (scale > 0)
        if tl.max(sound.to(tl.int32), 0) > 0:
            found = _by_step(values, tl.where(sound, scale, 1.0) * factor)
            kept |= sound & (tl.min((found == values).to(tl.int32), 1) > 0)
    result = tl.where(kept[:, None], values, result)
    result = tl.where((bits < INFINITE)[:, None], result, float("nan"))
    tl.store(served + place, result.to(served.dtype.element_ty), inside)


@triton.jit
def _fp8(weight, served, rows, cols, high: tl.constexpr, wide: tl.constexpr, powers: tl.constexpr):
    down, across = tl.cdiv(rows, high), tl.cdiv(cols, wide)
    block = tl.program_id(0)
    matrix, block = block // (down * across), block % (down * across)
    row = block // across * high + tl.arange(0, high)
    col = block % across * wide + tl.arange(0, wide)
    place = (matrix.to(tl.int64) * rows + row)[:, None] * cols + col[None, :]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    values = _round(tl.load(weight + place, inside, 0.0))
    bits = values.to(tl.int32, bitcast=True)
    amax = tl.max(tl.max(bits & MAGNITUDE, 1), 0)
    if powers:  # the smallest that is not less than amax / 448, which is 1.75 * 2^8
        power = (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = _power_of_two(tl.where(amax == 0, 127, tl.maximum(power, 0)))
    else:
        scale = tl.div_rn(amax.to(tl.float32, bitcast=True), 448.0)
        scale = tl.where(scale == 0, 1.0, scale)
    quotient = tl.div_rn(values, tl.broadcast_to(scale, values.shape)).to(tl.int32, bitcast=True)
    code = _e4m3(tl.minimum((quotient & MAGNITUDE).to(tl.float32, bitcast=True), 448.0))
    signed = (code.to(tl.int32, bitcast=True) | (quotient & SIGN)).to(tl.float32, bitcast=True)
    result = tl.where(amax < INFINITE, _round(signed * scale), float("nan"))
    tl.store(served + place, result.to(served.dtype.element_ty), inside)


@triton.jit
def _by_step(values, step):
    """bf16(code * step) of the nearest codes of e2m1, as f32."""
    return _round(_e2m1(tl.div_rn(values, tl.broadcast_to(step[:, None], values.shape))) * step[:, None])


@triton.jit
def _e2m1(quotient):
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, half to the even code, with the sign of what is not zero."""
    magnitude = tl.minimum(tl.abs(quotient), 6.0)
    unit = tl.where(magnitude < 2, 0.5, tl.where(magnitude < 4, 1.0, 2.0))
    inverse = tl.where(magnitude < 2, 2.0, tl.where(magnitude < 4, 1.0, 0.5))
    code = ((magnitude * inverse + SHIFT) - SHIFT) * unit
    sign = tl.where(quotient < 0, SIGN, 0)
    return (code.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(magnitude):
    """The nearest of e4m3 to 0 <= f32 <= 448, half to even: three bits of the mantissa, and below 2^-6 multiples of 2^-9."""
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 0.015625, (magnitude + 24576.0) - 24576.0, normal)


@triton.jit
def _power_of_two(stored):
    """int32, 0 <= stored < 255 -> 2^(stored - 127), f32."""
    return tl.where(stored > 0, stored << 23, 0x400000).to(tl.float32, bitcast=True)
