"""Plain values, which need nobody's word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.formats.dense import Dense
from kconvert.proof.parity.witnesses.base import State, Witness

if TYPE_CHECKING:
    import torch


class DenseWitness(Witness[Dense]):
    by_library = False

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        if (out := self.format.transposed) is None:
            return state["weight"]
        return state[""].view(-1, shape[1], out).swapaxes(1, 2).reshape(-1, shape[1])
