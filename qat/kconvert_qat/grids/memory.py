"""Tensors in memory as the kernels take them, which run without the GIL on as many threads as torch uses."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRESH = 1 << 25  # bytes from which on the C library keeps no memory for the next that asks


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The contiguous tensor's memory: bf16 in u16, or f32."""
    return bytes_of(tensor).view("u2" if tensor.dtype == torch.bfloat16 else "f4").reshape(tensor.shape)


def bytes_of(tensor: torch.Tensor) -> NDArray[Any]:
    """Any contiguous tensor's memory, u8. Not by numpy(), after which FSDP2 could not free the storage."""
    if not tensor.numel():
        return np.empty(0, "u1")
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memory, "u1")


def room(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory on the CPU; on Linux of huge pages, where it is so large that it comes from the system each time:
    page by page that takes longer than to compute what is put into it."""
    found = torch.empty(shape, dtype=dtype)
    if found.nbytes >= FRESH and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-found.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (found.data_ptr() + found.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)  # advice: may fail
    return found


def in_threads(work: Callable[[Any], None], pieces: Iterable[Any]) -> None:
    """Do `work` on each piece; the caller's thread does its part."""
    pieces = list(pieces)
    threads = min(torch.get_num_threads(), len(pieces))
    queue = iter(pieces)  # a list's iterator gives every piece to one thread

    def share() -> None:
        for piece in queue:
            work(piece)

    if threads <= 1:
        share()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(share) for _ in range(threads - 1)]
        share()
        for other in others:
            other.result()
