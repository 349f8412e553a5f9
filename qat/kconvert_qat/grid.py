"""Fake quantisation: the values that the exported INT4 checkpoint will have, in the forward pass of training.

One arithmetic serves the trainer, the exporter and the checks: `fake_quantise` is the exact INT4 encoder of
formats.packed followed by its decoder. A group that codes and a scale reproduce already, as after decoding a checkpoint,
stays as it is; any other gets the scale and codes of the convention's rule. It is one opaque operator, so that
torch.compile cannot elide the rounding of scales to bf16, which would change 7% of the values.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kconvert.formats.conventions import CONVENTIONS, Convention
from kconvert.formats.reference import packed as reference

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = (torch.bfloat16, torch.float32)
CHUNK = 1 << 18  # values that are work enough for a thread
REFERENCE_CHUNK = 1 << 26  # values at a time on other devices, where a pass needs some thirty bytes for each


def fake_quantise(weight: torch.Tensor, group_size: int, convention: str, clip: bool = False) -> torch.Tensor:
    """[..., in] bf16 or f32 -> the INT4 values of the weight cast to bf16, in the weight's dtype; `group_size` divides `in`.

    The gradient passes straight through; with `clip` not where the rule's code had to be clamped (kimi's never has).
    A group with a value that is not finite becomes NaN.
    """
    served: torch.Tensor = torch.ops.kconvert.fake_quantise(weight, group_size, convention, clip)
    return served


@torch.library.custom_op("kconvert::fake_quantise", mutates_args=())
def _fake_quantise(weight: torch.Tensor, group_size: int, convention: str, clip: bool) -> torch.Tensor:
    rule = CONVENTIONS[convention]
    groups = weight.detach().contiguous().view(-1, group_size)
    served = torch.empty_like(groups)
    if weight.is_cpu:
        _by_kernel(groups, rule, served)
    elif weight.is_cuda:
        from kconvert_qat import cuda

        cuda.fake_quantise(groups, rule, served)
    else:
        step = max(1, REFERENCE_CHUNK // group_size)
        for first in range(0, len(groups), step):
            served[first : first + step] = reference.fake_quantise(groups[first : first + step], group_size, rule)
    return served.view(weight.shape)


@_fake_quantise.register_fake
def _(weight: torch.Tensor, group_size: int, convention: str, clip: bool) -> torch.Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _by_kernel(groups: torch.Tensor, rule: Convention, served: torch.Tensor) -> None:
    """The kernel on as many threads as torch uses; it runs without the GIL."""
    from kconvert.formats.kernels import packed as kernels

    def work(values: NDArray[Any], target: NDArray[Any]) -> None:
        kernels.fake_quantise(
            values, np.float32(rule.divisor), np.float32(rule.lowest), rule.rounds, rule.zero_bits, target
        )

    threads = min(torch.get_num_threads(), -(-groups.numel() // CHUNK))
    inputs, outputs = _array(groups), _array(served)
    if threads <= 1:
        work(inputs, outputs)
        return
    step = -(-len(groups) // threads)
    starts = range(0, len(groups), step)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, (inputs[k : k + step] for k in starts), (outputs[k : k + step] for k in starts)))


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The contiguous tensor's memory [groups, g]. Not by numpy(), after which FSDP2 could not free the storage."""
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return np.empty(tensor.shape, np.uint16)
    memory: Any = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    array: NDArray[Any] = np.frombuffer(memory, "u2" if tensor.dtype == torch.bfloat16 else "f4")
    return array.reshape(tensor.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    weight, ctx.group_size, ctx.convention, ctx.clip = inputs
    if ctx.clip:
        ctx.save_for_backward(weight)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    if ctx.clip:
        (weight,) = ctx.saved_tensors
        gradient = torch.ops.kconvert.clip_gradient(gradient, weight, ctx.group_size, ctx.convention)
    return gradient, None, None, None


_fake_quantise.register_autograd(_backward, setup_context=_setup_context)


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
