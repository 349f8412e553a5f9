"""The served weights of a module, computed once for each version of its parameters and not once a forward.

On the CPU the version of a weight is a fingerprint of all its bits, which costs a small part of a copy and sees every way in
which a weight can change: `.data` writes, which torch does not count, and FSDP2's gathering, which it hides from the count. On
other devices that would wait for the device at every forward; there it is the Parameter itself, its address, torch's count and
the step that `at_step` was told. What is no Parameter of its own there, or may be sharded, is not kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from kconvert_qat.grids.memory import array_of, in_threads

if TYPE_CHECKING:
    from kconvert_qat.grids.codes import Codes

WORDS = 1 << 21  # of a piece of a fingerprint, whatever the number of threads


class Kept:
    """What a weight was served as last: its values, or codes that make them. It is neither copied nor saved with its module."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, torch.Tensor | Codes, int] | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def get(self, version: Hashable, make: Callable[[], torch.Tensor | Codes]) -> torch.Tensor | Codes:
        """What was made for this version and nobody has written into since; else what `make` makes now."""
        held = self._held
        if held is not None and held[0] == version and held[2] == held[1]._version:
            return held[1]
        self._held = held = None  # before another one takes as much memory
        made = make()
        self._held = version, made, made._version
        return made


def version_of(weight: torch.Tensor, step: int) -> Hashable | None:
    """What is the same only as long as the weight is; None where nothing tells that."""
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return None
    if weight.is_cpu:
        return weight.shape, weight.dtype, _fingerprint(weight.detach().contiguous())
    if not isinstance(weight, nn.Parameter) or weight.is_inference() or _may_be_sharded():
        return None
    return weakref.ref(weight), weight.data_ptr(), weight._version, step


def _may_be_sharded() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _fingerprint(weight: torch.Tensor) -> bytes:
    """Of the bits of a contiguous tensor whose size in bytes is a multiple of four."""
    from kconvert.formats.kernels.bits import LANES, fingerprint

    words = array_of(weight).reshape(-1).view("u4")
    lanes = np.ones((-(-len(words) // WORDS), LANES), "u4")
    in_threads(lambda k: fingerprint(words[k * WORDS : (k + 1) * WORDS], lanes[k]), range(len(lanes)))
    return lanes.tobytes()
