"""The served weights of a module, computed once for each version of its parameters and not once a forward.

On the CPU the version of a weight is a fingerprint of all its bits, which costs a small part of a copy and sees every way in
which a weight can change: `.data` writes, which torch does not count, and FSDP2's gathering, which it hides from the count. On
other devices that would wait for the device at every forward; there it is the Parameter itself, its address, torch's count and
the step that `at_step` was told. What is no Parameter of its own there, or may be sharded, is not kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kconvert_qat.grids.fingerprints import fingerprint

if TYPE_CHECKING:
    from kconvert_qat.grids.codes import Codes


class Kept:
    """What a weight was served as last: its values, or codes that make them. It is neither copied nor saved with its module,
    and let go of before an optimiser changes the weight, which takes memory of its own."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, torch.Tensor | Codes, int] | None = None
        self._trains = False
        _watch_optimisers()
        _ALL.add(self)

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def get(self, version: Hashable, trains: bool, make: Callable[[], torch.Tensor | Codes]) -> torch.Tensor | Codes:
        """What was made for this version and nobody has written into since; else what `make` makes now. `trains`: an optimiser
        may change the weight."""
        held = self._held
        if held is not None and held[0] == version and held[2] == held[1]._version:
            self._trains |= trains
            return held[1]
        self._held = held = None  # before another one takes as much memory
        made = make()
        self._held, self._trains = (version, made, made._version), trains
        return made

    def drop(self) -> None:
        """But not of a weight that nobody trains."""
        if self._trains:
            self._held = None


_ALL: weakref.WeakSet[Kept] = weakref.WeakSet()


@cache
def _watch_optimisers() -> None:
    """Any of torch's, of any model: what is dropped in vain is made again."""

    def drop(optimiser: object, arguments: object, options: object) -> None:
        for kept in list(_ALL):
            kept.drop()

    register_optimizer_step_pre_hook(drop)


def version_of(weight: torch.Tensor, step: int) -> Hashable | None:
    """What is the same only as long as the weight is; None where nothing tells that."""
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return None
    if weight.is_cpu:
        return fingerprint(weight)
    if not isinstance(weight, nn.Parameter) or weight.is_inference() or _may_be_sharded():
        return None
    return weakref.ref(weight), weight.data_ptr(), weight._version, step


def _may_be_sharded() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
