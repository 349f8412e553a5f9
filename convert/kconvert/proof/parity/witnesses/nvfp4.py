"""NVFP4 by compressed-tensors, and by ModelOpt's formula in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats import Format, nvfp4
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.models.model import Weight
from kconvert.proof.parity import library
from kconvert.proof.parity.metrics import same_bits
from kconvert.proof.parity.quick import e2m1 as quick
from kconvert.proof.parity.witnesses.base import State, Witness, count_bytes, in_pieces, nibbles, scheme, without_unused
from kconvert.proof.parity.witnesses.mx import E2M1

if TYPE_CHECKING:
    import torch


class Nvfp4Witness(Witness[Nvfp4]):
    has_many_spellings = True

    def arguments(self) -> dict[str, Any]:
        return {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": nvfp4.GROUP}

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        if self.format.multiplies:
            return self._modelopt_values(state, shape)
        state = without_unused(self.format, state)
        compressor = library.part("compressors.nvfp4", "NVFP4PackedCompressor")
        values: torch.Tensor = compressor.decompress(state, scheme(self))["weight"]
        return values

    def _modelopt_values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """compressed-tensors' codes, and ModelOpt's product of them."""
        import torch

        steps = state["weight_scale"].float() * state[nvfp4.NAMES[True][1]]
        unpack_fp4_from_uint8 = library.part("compressors.nvfp4.helpers", "unpack_fp4_from_uint8")
        codes = unpack_fp4_from_uint8(state["weight"], *shape, dtype=torch.float32)
        values: torch.Tensor = codes.view(shape[0], -1, nvfp4.GROUP) * steps.unsqueeze(-1)
        return values.view(shape).bfloat16()

    def products(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """Codes times scales, exact in F32, times the global factor: the inverse, in F32, of compressed-tensors' scale."""
        import torch

        unpack_fp4_from_uint8 = library.part("compressors.nvfp4.helpers", "unpack_fp4_from_uint8")
        packed, other = (state[name] for name in nvfp4.NAMES[self.format.multiplies])
        codes = unpack_fp4_from_uint8(packed, *shape, dtype=torch.float32).view(shape[0], -1, nvfp4.GROUP)
        values: torch.Tensor = codes * state["weight_scale"].float().unsqueeze(-1)
        return values.view(shape) * (other if self.format.multiplies else 1 / other)

    @property
    def shared(self) -> str:
        return nvfp4.NAMES[self.format.multiplies][1]

    @property
    def has_reference(self) -> bool:
        return not self.format.unused

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        """Nothing in a checkpoint says with which scales it was made, and only the source's scales which global factor belongs
        there: the one that was found. Groups that give back every value are right, whichever codes they have."""
        import torch

        from kconvert.formats.reference import nvfp4 as reference

        codes, global_scale = (found[name] for name in nvfp4.NAMES[self.format.multiplies])
        factor = self._factor(found)
        right = reference.comes_back(values, codes, found["weight_scale"], global_scale, self.format.multiplies)
        for mse in (False, True):
            packed, scale = in_pieces(partial(reference.encode, factor=factor, mse=mse), values)
            packed = torch.where(right.repeat_interleave(nvfp4.GROUP // 2, -1), codes, packed)
            bits = torch.where(right, found["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
            yield {**found, nvfp4.NAMES[self.format.multiplies][0]: packed, "weight_scale": bits.view(scale.dtype)}

    def _factor(self, state: State) -> float:
        """The global one: the inverse, in F32, of compressed-tensors' scale."""
        global_scale = state[nvfp4.NAMES[self.format.multiplies][1]]
        return float(global_scale if self.format.multiplies else 1 / global_scale)

    def is_quick(self, cols: int) -> bool:
        return not self.format.unused

    def quick_values(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        packed, other = (state[name] for name in nvfp4.NAMES[self.format.multiplies])
        return quick.decode_nvfp4(packed, state["weight_scale"], float(other), self.format.multiplies, buffers)

    def quick_products(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        return self.products(state, (len(state["weight_scale"]), cols))

    @property
    def judges_quickly(self) -> bool:
        return self.has_reference

    def is_made_of(self, values: torch.Tensor, weight: Weight, first: int, found: State, buffers: Buffers) -> bool:
        codes, other = (found[name] for name in nvfp4.NAMES[self.format.multiplies])
        scale, factor = found["weight_scale"], self._factor(found)
        return 0 < factor < math.inf and quick.is_nvfp4_of(
            values, codes, scale, float(other), self.format.multiplies, factor
        )

    def copies(self, found: State, source: Format, state: State) -> bool:
        """Those of MXFP4, each of whose scales is there twice, or of the other spelling; whatever the scale of zeros is."""
        import torch

        own, other = (found[name] for name in nvfp4.NAMES[self.format.multiplies])
        if isinstance(source, Mx) and source.bits == 4:
            codes, powers = state[source.codes_name].view(torch.uint8), state[source.scale_name]
            steps = powers, found["weight_scale"], own, float(other), self.format.multiplies
            return same_bits(codes, own) and quick.same_as_powers(*steps)
        if isinstance(source, Nvfp4):
            codes = state[nvfp4.NAMES[source.multiplies][0]].view(torch.uint8)
            return same_bits(codes, own) and quick.same_steps(
                Nvfp4Witness(source).scales(state), self.scales(found), own
            )
        return False

    def largest_step(self, state: State) -> torch.Tensor | None:
        return self.scales(state)

    def respelt(self, source: Format, state: State) -> State | None:
        """Of the other spelling, with the inverse of its global scale."""
        if not isinstance(source, Nvfp4) or source.multiplies == self.format.multiplies:
            return None
        (theirs, other), (ours, inverse) = (
            nvfp4.NAMES[multiplies] for multiplies in (source.multiplies, not source.multiplies)
        )
        return {ours: state[theirs], "weight_scale": state["weight_scale"], inverse: 1 / state[other]}

    def grid(self) -> tuple[float, ...]:
        return E2M1

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        return nibbles(count_bytes(state[nvfp4.NAMES[self.format.multiplies][0]]))

    def scales(self, state: State) -> torch.Tensor:
        other = float(state[nvfp4.NAMES[self.format.multiplies][1]])
        return quick.steps_of(state["weight_scale"], other, self.format.multiplies)

    def group_columns(self, cols: int) -> int:
        return nvfp4.GROUP


def changed_by_inverse(state: State) -> int:
    """How many groups of compressed-tensors' tensors have other values where the inverse of their global scale multiplies."""
    import torch

    packed, scale = (
        state[nvfp4.NAMES[False][0]].view(-1, nvfp4.GROUP // 2),
        state["weight_scale"].view(torch.uint8).view(-1),
    )
    steps, other = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(), state[nvfp4.NAMES[False][1]]
    before, after = (
        (step.unsqueeze(-1) * torch.tensor(E2M1)).bfloat16() for step in (steps / other, steps * (1 / other))
    )
    changed = before.view(torch.int16) != after.view(torch.int16)
    doubtful = changed.any(-1)[scale.int()]
    if not doubtful.any():
        return 0
    packed, scale = packed[doubtful], scale[doubtful]
    codes = torch.cat([packed & 15, packed >> 4], -1).long()
    return int(changed[scale.int()].gather(1, codes).any(-1).sum())
