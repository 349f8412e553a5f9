"""The served weights of a module, computed once for each version of its parameters and not once a forward.

To keep them for all forwards takes a copy of the experts. `backward`, the default, takes none that training has not anyway:
what matmuls saved for their backward pass is found again by a weak reference, and from one pass of a step to the next it is
kept where passes have held it, and steps have several. Where nothing holds it, as in an evaluation, it goes with the forward.

On the CPU the version of a weight is a fingerprint of all its bits, which costs a small part of a copy and sees every way in
which a weight can change: `.data` writes, which torch does not count, and FSDP2's gathering, which it hides from the count. On
other devices that would wait for the device at every forward; there it is the Parameter itself, its address, torch's count and
the step that `at_step` was told. What is no Parameter of its own there, or may be sharded, is not kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdRef

from kconvert_qat.config import BACKWARD
from kconvert_qat.grids.fingerprints import fingerprint

if TYPE_CHECKING:
    from kconvert_qat.grids.codes import Codes


class Made(NamedTuple):
    """What was made for a version, as long as anybody holds it, and how often it had been written into. In one piece, as
    another thread may ask at any moment."""

    version: Hashable
    writes: int
    found: weakref.ref[torch.Tensor | Codes]


class Kept:
    """What a weight was served as last: its values, or codes that make them. It is neither copied nor saved with its module,
    and let go of before an optimiser changes the weight, which takes memory of its own."""

    def __init__(self, keep: str) -> None:
        self._keep = keep
        self._trains = False
        self._held: torch.Tensor | Codes | None = None
        self._last: Made | None = None
        self._is_kept = False  # beyond this forward
        self._in_forward = False
        self._passes = Passes()
        _watch_optimisers()
        _ALL.add(self)

    def __reduce__(self) -> tuple[type[Kept], tuple[str]]:
        return Kept, (self._keep,)

    def get(self, version: Hashable, trains: bool, make: Callable[[], torch.Tensor | Codes]) -> torch.Tensor | Codes:
        """What was made for this version, if it is still there and nobody has written into it; else what `make` makes now.
        `trains`: an optimiser may change the weight."""
        last = self._last
        made = None if last is None else last.found()
        is_same = last is not None and version == last.version
        if last is None or made is None or not is_same or made._version != last.writes:
            self._held = made = None  # before another one takes as much memory
            self._passes.made(is_same)
            self._is_kept = False
            made = make()
            self._trains, self._last = False, Made(version, made._version, weakref.ref(made))
        elif not self._in_forward:
            self._passes.found()
        self._held, self._in_forward = made, True
        self._trains |= trains
        return made

    def end_forward(self) -> None:
        """What nobody else holds goes, unless it is kept."""
        if self._in_forward and not self._is_kept and self._keep == BACKWARD and self._last is not None:
            found, self._held = self._last.found, None
            self._is_kept = self._passes.ended(found() is not None)
            self._held = found() if self._is_kept else None
        self._in_forward = False

    def before_step(self) -> None:
        """But not of a weight that nobody trains."""
        if self._trains:
            self._held, self._is_kept = None, False
            self._passes.stepped()


class Passes:
    """Learns whether a weight has several backward passes a step, as with micro-batches, so that to keep what it is served as
    in between takes no more memory than the next pass needs.

    A forward whose values nobody holds afterwards has none (an evaluation, an input without gradient), or is the first of
    gradient checkpointing, whose second, within the backward pass, is held for a moment only: not to be kept.
    """

    def __init__(self) -> None:
        self._several = False
        self._had_one = False  # of this version
        self._had_more = False
        self._was_let_go = False  # since the last that was held

    def made(self, is_same: bool) -> None:
        """The values are computed, again if the version is the same: what was held is gone, so its backward pass is over."""
        if not is_same:
            self._several &= self._had_more
            self._had_one = self._had_more = False
        elif self._had_one:
            self._several = self._had_more = True

    def found(self) -> None:
        self._had_more = True

    def ended(self, is_held: bool) -> bool:
        """At the end of a forward; whether to keep its values."""
        counts = is_held and not self._was_let_go
        self._had_one |= counts
        self._was_let_go = not is_held
        return counts and self._several

    def stepped(self) -> None:
        """What follows is no further pass of the same step, even if the weight is what it was."""
        self._had_one = False


_ALL: weakref.WeakSet[Kept] = weakref.WeakSet()


@cache
def _watch_optimisers() -> None:
    """Any of torch's, of any model: what is dropped in vain is made again."""

    def drop(optimiser: object, arguments: object, options: object) -> None:
        for kept in list(_ALL):
            kept.before_step()

    register_optimizer_step_pre_hook(drop)


def version_of(weight: torch.Tensor, step: int) -> Hashable | None:
    """What is the same only as long as the weight is; None where nothing tells that."""
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return None
    if weight.is_cpu:
        return fingerprint(weight)
    if not isinstance(weight, nn.Parameter) or weight.is_inference() or _may_be_sharded():
        return None
    return WeakIdRef(weight), weight.data_ptr(), weight._version, step


def _may_be_sharded() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
