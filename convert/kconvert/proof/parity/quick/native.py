"""Loops over a weight's elements for which torch has no operator, as machine code: the functions of `loops`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from kconvert.formats import conventions
from kconvert.native import Package

if TYPE_CHECKING:
    import torch

LOOPS = Package("kconvert.proof.parity.quick.loops", conventions)


class Loop:
    """A function of `loops`, by the name of its module and its own; `signature` are the kinds of its arguments, see
    native.Loop, of which arrays are addresses.

    Called with contiguous tensors for these, it says nothing of whether they are long enough.
    """

    def __init__(self, module: str, name: str, signature: str) -> None:
        self.module, self.name = module, name
        self.types = tuple(signature.split())

    def __call__(self, *arguments: torch.Tensor | float) -> int:
        return self._code(*(_passed(*each) for each in zip(arguments, self.types, strict=True)))

    @cached_property
    def _code(self) -> Callable[..., int]:
        return LOOPS.load(self.module, self.name, self.types)


def _passed(argument: torch.Tensor | float, kind: str) -> float | None:
    if not kind.endswith("*"):
        return argument  # type: ignore[return-value]
    assert not isinstance(argument, int | float)
    assert argument.is_contiguous()
    assert argument.element_size() == int(kind[1])
    return argument.data_ptr()
