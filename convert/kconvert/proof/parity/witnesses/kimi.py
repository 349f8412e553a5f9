"""What is computed of Kimi-K3's tensors for llama.cpp, by torch: see formats.engines.kimi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kconvert.formats import Format, Part
from kconvert.formats.engines.kimi import Product
from kconvert.proof.parity.witnesses.base import State, Witness

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Exponents(Format):
    """A weight [1, heads] whose values are -exp of the first of `length` numbers. For reading only."""

    length: int

    @property
    def label(self) -> str:
        return "f32 of exponents"

    @property
    def quantised(self) -> bool:
        return False

    @property
    def value_dtype(self) -> str:
        return "F32"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return (Part("", "F32", (rows, self.length)),)


class ProductWitness(Witness[Product]):
    by_library = False

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        return state["norm"].float().view(shape) * state["projection"].float().view(shape)


class ExponentsWitness(Witness[Exponents]):
    by_library = False

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        return -state[""].double().view(shape[0], -1)[:, : shape[1]].exp().float()
