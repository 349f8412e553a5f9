"""Tensors in memory as the kernels take them, which run without the GIL on as many threads as torch uses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The contiguous tensor's memory: bf16 in u16, or f32. Not by numpy(), after which FSDP2 could not free the storage."""
    dtype = "u2" if tensor.dtype == torch.bfloat16 else "f4"
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return np.empty(tensor.shape, dtype)
    memory: Any = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    array: NDArray[Any] = np.frombuffer(memory, dtype)
    return array.reshape(tensor.shape)


def in_threads(work: Callable[[Any], None], pieces: Iterable[Any]) -> None:
    """Do `work` on each piece."""
    pieces = list(pieces)
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, pieces))
