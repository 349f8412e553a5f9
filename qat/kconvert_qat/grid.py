"""Fake quantisation: the values that the exported checkpoint will have, in the forward pass of training.

One arithmetic serves the trainer, the exporter and the checks: `fake_quantise` is the encoder of the grid's format and then its
decoder. A group that codes and a scale reproduce already, as after decoding a checkpoint, stays as it is; any other gets
scale and codes of the convention's rule. It is one opaque operator, so that torch.compile cannot elide the rounding of scales
to bf16, which would change 7% of the values of INT4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.reference import packed as reference
from kconvert_qat.grids import codes
from kconvert_qat.grids.memory import in_threads, room
from kconvert_qat.grids.table import GRIDS

DTYPES = (torch.bfloat16, torch.float32)
CHUNK = 1 << 18  # values that are work enough for a thread
REFERENCE_CHUNK = 1 << 26  # values at a time on other devices, where a pass needs some thirty bytes for each
INT4 = "int4"


def fake_quantise(
    weight: torch.Tensor,
    group_size: int,
    convention: str,
    clip: bool = False,
    grid: str = INT4,
    mate: torch.Tensor | None = None,
) -> torch.Tensor:
    """[..., rows, in] bf16 or f32 -> the grid's values of the weight cast to bf16, in the weight's dtype.

    The gradient passes straight through; with `clip`, for INT4, not where the rule's code had to be clamped (kimi's never has).
    `mate` is what engines fuse with the weight. A group with a value that is not finite becomes NaN.
    """
    served: torch.Tensor = torch.ops.kconvert.fake_quantise(weight, group_size, convention, clip, grid, mate)
    return served


@torch.library.custom_op("kconvert::fake_quantise", mutates_args=())
def _fake_quantise(
    weight: torch.Tensor,
    group_size: int,
    convention: str,
    clip: bool,
    grid: str = "int4",
    mate: torch.Tensor | None = None,
) -> torch.Tensor:
    weight = weight.detach().contiguous()
    if weight.is_cpu:
        return _by_kernel(weight, group_size, convention, grid, mate)
    if weight.is_cuda:
        from kconvert_qat.grids import cuda_floats

        served = torch.empty_like(weight)
        cuda_floats.fake_quantise(weight, group_size, convention, grid, mate, served)
        return served
    return _by_reference(weight, group_size, convention, grid, reaches(weight, mate, grid))


@_fake_quantise.register_fake
def _(
    weight: torch.Tensor,
    group_size: int,
    convention: str,
    clip: bool,
    grid: str = "int4",
    mate: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def encode(
    weight: torch.Tensor, group_size: int, convention: str, grid: str, mate: torch.Tensor | None = None
) -> codes.Codes:
    """What `fake_quantise` decodes, of a weight in the CPU's memory."""
    return codes.encode(weight, GRIDS[grid].blocks(group_size, convention), reaches(weight, mate, grid))


def reaches(weight: torch.Tensor, mate: torch.Tensor | None, grid: str) -> Sequence[float]:
    """For each matrix in [..., rows, cols] the largest finite magnitude in it and its mate, as bf16; 0 where no grid asks."""
    matrices = weight.detach().reshape(-1, *weight.shape[-2:])
    if not GRIDS[grid].fuses:
        return [0.0] * len(matrices)
    largest = _largest(matrices)
    return largest if mate is None else [max(pair) for pair in zip(largest, _largest(mate.detach()[None]), strict=True)]


def _largest(matrices: torch.Tensor) -> list[float]:
    if matrices.is_cpu:
        return _largest_by_kernel(matrices.contiguous())
    flat = matrices.flatten(1)
    low, high = flat.aminmax(dim=1)
    if not bool((low.isfinite() & high.isfinite()).all()):
        low, high = flat.nan_to_num(0, 0, 0).aminmax(dim=1)
    return torch.maximum(-low, high).bfloat16().tolist()


def _largest_by_kernel(matrices: torch.Tensor) -> list[float]:
    from kconvert_qat.grids import kernels

    arrays = codes.matrices_of(matrices)
    found = [0.0] * len(arrays)
    parts: list[tuple[int, np.float32]] = []

    def work(piece: tuple[int, int, int]) -> None:
        bits = kernels.reach(codes.rows_of(arrays, piece).reshape(-1, kernels.NV_GROUP))
        parts.append((piece[0], np.uint32(bits).view(np.float32)))

    in_threads(work, codes.pieces_of(arrays.shape, 1, CHUNK))
    for matrix, reach in parts:
        found[matrix] = max(found[matrix], float(reach))
    return found


def _by_kernel(
    weight: torch.Tensor, group_size: int, convention: str, grid: str, mate: torch.Tensor | None
) -> torch.Tensor:
    served = room(weight.shape, weight.dtype)
    if not weight.numel():
        return served
    spec, reach = GRIDS[grid], reaches(weight, mate, grid)
    matrices, results = codes.matrices_of(weight), codes.matrices_of(served)
    if spec.rows == 1 and not spec.fuses:  # rows do not care in which matrix they are
        reach = [0.0]
        matrices, results = (array.reshape(1, -1, array.shape[-1]) for array in (matrices, results))

    def work(piece: tuple[int, int, int]) -> None:
        rows = codes.rows_of(matrices, piece), codes.rows_of(results, piece)
        spec.kernel(*rows, reach[piece[0]], group_size, convention)

    in_threads(work, codes.pieces_of(matrices.shape, spec.rows, CHUNK))
    return served


def _by_reference(
    weight: torch.Tensor, group_size: int, convention: str, grid: str, reach: Sequence[float]
) -> torch.Tensor:
    """Some matrices at a time."""
    matrices = weight.view(-1, *weight.shape[-2:]) if weight.dim() > 1 else weight.view(1, 1, -1)
    served = torch.empty_like(matrices)
    limits = torch.tensor(reach, dtype=torch.float32)
    step = max(1, REFERENCE_CHUNK // max(1, matrices[0].numel()))
    for first in range(0, len(matrices), step):
        chosen = slice(first, first + step)
        values = matrices[chosen].bfloat16().float()
        lost = _spread(~values.isfinite(), GRIDS[grid].rows, group_size)
        found = GRIDS[grid].reference(values.masked_fill(lost, 0), limits[chosen], group_size, convention)
        served[chosen] = found.masked_fill(lost, torch.nan)
    return served.view(weight.shape)


def _spread(lost: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """bool [n, rows, cols]: true all over a block with one that is."""
    if not bool(lost.any()):
        return lost
    down, across = lost.shape[1:]
    blocks = torch.nn.functional.max_pool2d(lost.float(), (rows, cols), ceil_mode=True)
    return blocks.repeat_interleave(rows, 1)[:, :down].repeat_interleave(cols, 2)[..., :across].bool()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    weight, ctx.group_size, ctx.convention, ctx.clip, *_ = inputs
    if ctx.clip:
        ctx.save_for_backward(weight)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
    if ctx.clip:
        (weight,) = ctx.saved_tensors
        gradient = torch.ops.kconvert.clip_gradient(gradient, weight, ctx.group_size, ctx.convention)
    return gradient, None, None, None, None, None


_fake_quantise.register_autograd(_backward, setup_context=_setup_context)


class StraightThrough(torch.autograd.Function):
    """What was served before, as if it were made of the weight now: the values themselves, and `fake_quantise`'s gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: torch.Tensor, served: torch.Tensor, group_size: int, convention: str, clip: bool
    ) -> torch.Tensor:
        return served.view_as(served)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, _, *options = inputs
        _setup_context(ctx, (weight, *options), output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _backward(ctx, gradient)[0], None, None, None, None


@torch.library.custom_op("kconvert::clip_gradient", mutates_args=())
def _clip_gradient(gradient: torch.Tensor, weight: torch.Tensor, group_size: int, convention: str) -> torch.Tensor:
    """The gradient, zero where the code by the convention's rule has to be clamped."""
    rule = CONVENTIONS[convention]
    groups = weight.bfloat16().float().view(-1, group_size)
    codes = reference.unclamped(groups, reference.rule_scale(groups, rule), rule)
    kept = _fake_quantise(weight, group_size, convention, False).view_as(groups) == groups
    inside = ((codes >= rule.lowest) & (codes <= rule.highest)) | kept.all(-1, keepdim=True)
    return torch.where(inside.view(weight.shape), gradient, 0)


@_clip_gradient.register_fake
def _(gradient: torch.Tensor, weight: torch.Tensor, group_size: int, convention: str) -> torch.Tensor:
    return torch.empty_like(gradient)
