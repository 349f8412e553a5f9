"""MXFP4 and NVFP4: f32 codes times f32 scales rounded to bf16, and whether they are as the reference encodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.metrics import below, same_bits
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

DECODE_NVFP4 = Loop("e2m1", "decode_nvfp4", "u1* u1* u4* i8 i8 f4 i8")
DECODE_MXFP4 = Loop("e2m1", "decode_mxfp4", "u1* u1* u4* i8 i8")
STEPS = Loop("e2m1", "nv_steps", "u1* f4* i8 f4 i8")
WRONG_NVFP4 = Loop("e2m1", "wrong_nvfp4", "u4* u1* u1* f4* i8 i8 i8 f4 f4 i8 i8")
WRONG_MXFP4 = Loop("e2m1", "wrong_mxfp4", "u4* u1* u1* f4* i8 i8 i8 i8")
OTHER_STEPS = Loop("e2m1", "other_steps", "u1* u1* u1* i8 i8 i8 f4 i8")
EXACT, AMAX, MSE = 0, 1, 2  # as the loops call them


def decode_nvfp4(
    packed: torch.Tensor, scale: torch.Tensor, other: float, multiplies: bool, buffers: Buffers
) -> torch.Tensor:
    """u8 [rows, cols / 2], e4m3 [rows, groups] and the global scale -> bf16 [rows, cols] in memory of `buffers`."""
    values = _room(packed, buffers)
    DECODE_NVFP4(packed.contiguous(), scale.contiguous(), _words(values), *_groups(values, scale), other, multiplies)
    return values


def decode_mxfp4(packed: torch.Tensor, scale: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """u8 [rows, cols / 2], u8 exponents [rows, groups] -> bf16 [rows, cols] in memory of `buffers`."""
    values = _room(packed, buffers)
    DECODE_MXFP4(packed.contiguous(), scale.contiguous(), _words(values), *_groups(values, scale))
    return values


def steps_of(scale: torch.Tensor, other: float, multiplies: bool) -> torch.Tensor:
    """e4m3 [...] times the global scale, or divided by it, f32."""
    import torch

    steps = torch.empty(scale.shape, dtype=torch.float32)
    STEPS(scale.contiguous(), steps, scale.numel(), other, multiplies)
    return steps


def powers_of(scale: torch.Tensor) -> torch.Tensor:
    """u8 exponents -> f32: 2 ** (exponent - 127)."""
    import torch

    steps = scale.int().bitwise_left_shift_(23).view(torch.float32)
    return steps.masked_fill_(scale == 0, 2.0**-127)


def same_steps(one: torch.Tensor, two: torch.Tensor, packed: torch.Tensor) -> bool:
    """Whether f32 steps [rows, groups] are the same; those of groups whose codes, u8 [rows, cols / 2], are zeros need only be
    positive."""
    import torch

    if same_bits(one, two):
        return True
    different = one.view(torch.int32) != two.view(torch.int32)
    sound = below(one, 1.0) and below(two, 1.0) and bool(((one > 0) & (two > 0))[different].all())
    codes = packed.view(*different.shape, -1)[different]
    return sound and not bool((codes & 0x77).any())


def same_as_powers(
    powers: torch.Tensor, scale: torch.Tensor, packed: torch.Tensor, other: float, multiplies: bool
) -> bool:
    """`same_steps` of u8 exponents [rows, groups] and the steps_of e4m3 [rows, several times as many]."""
    groups, parts = powers.numel(), scale.numel() // max(powers.numel(), 1)
    tensors = powers.contiguous(), scale.contiguous(), packed.contiguous()
    return not OTHER_STEPS(*tensors, groups, parts, packed.numel() // max(scale.numel(), 1), other, multiplies)


def is_nvfp4_of(
    values: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, other: float, multiplies: bool, factor: float
) -> bool:
    """Whether each group of finite bf16 [rows, cols] comes back from u8 codes, e4m3 scales [rows, groups] and the global one,
    or has what the reference makes of it by the factor; the latter with scales by amax, or all of least squared error."""
    import torch

    rows, groups = scale.shape
    tensors = _words(values), packed.contiguous(), scale.contiguous(), torch.empty(values.shape[1])
    pairs = values.shape[1] // max(groups, 1) // 2
    ways = (AMAX, MSE)
    return any(not WRONG_NVFP4(*tensors, rows, groups, pairs, factor, other, multiplies, way) for way in ways)


def is_mxfp4_of(values: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether finite bf16 [rows, cols] become these codes and u8 exponents by one of the ways."""
    import torch

    rows, groups = scale.shape
    tensors = _words(values), packed.contiguous(), scale.contiguous(), torch.empty(values.shape[1] // 2)
    pairs = values.shape[1] // max(groups, 1) // 2
    return any(not WRONG_MXFP4(*tensors, rows, groups, pairs, way) for way in (AMAX, EXACT, MSE))


def _room(packed: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    import torch

    return take(buffers, "values", torch.bfloat16, (len(packed), 2 * packed.shape[1]))


def _words(values: torch.Tensor) -> torch.Tensor:
    """bf16 [rows, cols] as pairs, i32 [rows, cols / 2]."""
    import torch

    return values.view(torch.int32)


def _groups(values: torch.Tensor, scale: torch.Tensor) -> tuple[int, int]:
    """How many there are, and the pairs of values in each."""
    return scale.numel(), values.numel() // 2 // max(scale.numel(), 1)
