"""Whether a weight is what it was: a fingerprint of its bits, a small part of a copy to make.

Blocks of words go through NH (Black et al., UMAC, 1999), twice, under keys that are drawn anew in each process: two weights
that differ, however they do, have one fingerprint by a chance of 2^-64 at most, which their values cannot raise as they do not
know the keys. What all the blocks give, a 512th, goes through SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kconvert_qat.grids.memory import bytes_of, in_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALF = 1024  # pairs of words in a block
BLOCK = 8 * HALF  # bytes
KEYS = np.frombuffer(os.urandom(8 * (HALF + 1)), "u4").reshape(2, HALF + 1)
PIECE = 1 << 10  # blocks, for a thread


def fingerprint(tensor: torch.Tensor, more: str = "") -> bytes:
    """Of the bits of a tensor in the CPU's memory, its dtype and how it lies in it, and of what `more` there is."""
    lies = f"{more} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
    tensor = tensor.detach()
    tensor = tensor.mT if tensor.dim() > 1 and tensor.mT.is_contiguous() else tensor.contiguous()
    digest = hashlib.sha256(lies.encode())
    digest.update(_hashes(bytes_of(tensor)).data)
    return digest.digest()


def _hashes(data: NDArray[Any]) -> NDArray[Any]:
    """u64 [blocks, 2]; the last is filled up with zeros."""
    from kconvert_qat.grids import kernels

    whole = len(data) // BLOCK
    words = data[: whole * BLOCK].view("u4").reshape(whole, 2, HALF)
    last = np.zeros(BLOCK, "u1")
    last[: len(data) - whole * BLOCK] = data[whole * BLOCK :]
    found = np.empty((whole + 1, 2), np.uint64)
    kernels.nh(last.view("u4").reshape(1, 2, HALF), KEYS, found[whole:])

    def work(first: int) -> None:
        part = slice(first, min(first + PIECE, whole))
        kernels.nh(words[part], KEYS, found[part])

    in_threads(work, range(0, whole, PIECE))
    return found
