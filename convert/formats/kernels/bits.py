"""What the kernels share: how they are compiled, and rounding to bf16 by integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    return njit(nogil=True, cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def inline(function: F) -> F:
    return njit(nogil=True, inline="always", error_model="numpy")(function)  # type: ignore[no-any-return]


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
    return float_of(np.uint32(bf16) << np.uint32(16))


@inline
def round_bits(value: Any) -> Any:
    """f32 -> its bits rounded to bf16, half to even, in the upper 16 (the lower ones are rubbish); not for NaN."""
    bits = bits_of(value)
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@inline
def round_bf16(value: Any) -> Any:
    """f32 -> the nearest bf16, half to even, as f32; not for NaN."""
    return float_of(round_bits(value) & np.uint32(0xFFFF0000))
