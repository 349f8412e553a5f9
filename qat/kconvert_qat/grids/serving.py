"""What a prepared module's forward gets for a weight: the grid's values, kept as long as the weight is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kconvert.errors import KconvertError
from kconvert_qat.config import QATConfig
from kconvert_qat.experts import ExpertWeight
from kconvert_qat.grid import DTYPES, StraightThrough, encode, fake_quantise
from kconvert_qat.grids.codes import Codes
from kconvert_qat.grids.kept import Kept, version_of


@dataclass
class State:
    """What all the prepared modules of a model share. While it is not `active` they see their weights as they are."""

    config: QATConfig
    active: bool
    step: int = 0

    def serve(self, weight: torch.Tensor, of: Place, kept: Kept, mate: torch.Tensor | None = None) -> torch.Tensor:
        """The weight as the exported checkpoint has it."""
        config = self.config
        of.check(weight, config, whole=False)
        matrices = of.matrices(weight)
        options = (config.group_size, config.convention, config.gradient == "clip")
        versions = None if torch.compiler.is_compiling() else self._versions(weight, mate)
        if versions is None:
            return of.restored(fake_quantise(matrices, *options, config.grid, mate))
        plain = matrices.detach()

        def make() -> torch.Tensor | Codes:
            if config.keep == "codes":
                return encode(plain, config.group_size, config.convention, config.grid, mate)
            return fake_quantise(plain, *options, config.grid, mate)

        with torch.inference_mode(False), torch.no_grad():  # what it keeps may be for training next time
            made = kept.get(versions, weight.requires_grad, make)
            served = made if isinstance(made, torch.Tensor) else made.values()
        through: torch.Tensor = StraightThrough.apply(matrices, served, *options)  # type: ignore[no-untyped-call]
        return of.restored(through)

    def _versions(self, weight: torch.Tensor, mate: torch.Tensor | None) -> tuple[object, ...] | None:
        """None: nothing is kept."""
        if self.config.keep == "nothing":
            return None
        if self.config.keep == "codes" and not weight.is_cpu:
            raise KconvertError(
                f"codes are kept on the CPU only, and experts are on {weight.device}; keep what is served"
            )
        versions = [version_of(tensor, self.step) for tensor in (weight, mate) if tensor is not None]
        return None if None in versions else tuple(versions)


@dataclass(frozen=True)
class Place:
    """How the matrices of a weight lie in its parameter of this shape, and what it is called; see ExpertWeight."""

    key: str
    shape: tuple[int, ...]
    transposed: bool
    pieces: int
    concatenated: bool
    apart: bool

    @classmethod
    def of(cls, weight: ExpertWeight, config: QATConfig) -> Place:
        """A block of several rows may not lie across two matrices, so they are taken `apart`."""
        count = len(weight.pieces)
        shape = tuple(weight.tensor.shape)
        return cls(weight.key, shape, weight.transposed, count, weight.concatenated, config.spec.rows > 1 and count > 1)

    def check(self, weight: Any, config: QATConfig, whole: bool = True) -> None:
        """KconvertError when the grid cannot have this tensor, or it is not the one prepared; if not `whole`, some experts."""
        advice = "swap no parameters after prepare"
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2 or weight.layout != torch.strided:
            raise KconvertError(f"{self.key} has no dense matrices; {advice}")
        inputs = weight.shape[-2 if self.transposed else -1]
        if not config.spec.lays_out(inputs, config.group_size):
            raise KconvertError(
                f"{self.key} has {inputs} inputs, which do not divide into groups of {config.group_size}"
            )
        if weight.dtype not in DTYPES:
            raise KconvertError(f"{self.key} is {weight.dtype}; quantisation-aware training needs BF16 or F32 weights")
        which = slice(None if whole else -2, None)
        if weight.shape[which] != self.shape[which]:
            raise KconvertError(
                f"{self.key} is {list(weight.shape[which])}, but was {list(self.shape[which])} when it was prepared; {advice}, "
                "and shard experts by FSDP2 or expert parallelism, not within their matrices"
            )

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """[..., out, in]; those of one expert on each other, or beside each other where they are `apart`."""
        weight = weight.mT if self.transposed else weight
        if not self.apart:
            return weight
        *stack, _, cols = weight.shape
        if self.concatenated:
            return weight.reshape(*stack, self.pieces, -1, cols)
        return weight.reshape(*stack, -1, self.pieces, cols).transpose(-2, -3)

    def restored(self, matrices: torch.Tensor) -> torch.Tensor:
        """As the parameter has them."""
        if self.apart:
            matrices = (matrices if self.concatenated else matrices.transpose(-2, -3)).flatten(-3, -2)
        return matrices.mT if self.transposed else matrices
