"""Microscaled floats by compressed-tensors: MXFP4 and MXFP8, gpt-oss's stacks of MXFP4."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats.mx import GROUP, Mx
from kconvert.formats.stacks import MxStack
from kconvert.models.model import Weight
from kconvert.proof.parity import library
from kconvert.proof.parity.quick import e2m1 as quick
from kconvert.proof.parity.quick import mxfp8
from kconvert.proof.parity.witnesses.base import (
    State,
    Witness,
    count_bytes,
    in_pieces,
    nibbles,
    scheme,
)
from kconvert.proof.parity.witnesses.fp8 import e4m3_values

if TYPE_CHECKING:
    import torch

LARGEST = 0x7E  # which code of e4m3
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
COMPRESSORS = {4: ("mxfp4", "MXFP4PackedCompressor"), 8: ("mxfp8", "MXFP8QuantizationCompressor")}
E2M1 = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))


class MxWitness(Witness[Mx]):
    has_many_spellings = True

    def arguments(self) -> dict[str, Any]:
        return {"num_bits": self.format.bits, "type": "float", "strategy": "group", "group_size": GROUP}

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """It knows the tensors by the names that `Mx(bits)` has."""
        import torch

        usual = Mx(self.format.bits)
        codes = state[self.format.codes_name]
        codes = codes.view(torch.uint8 if self.format.bits == 4 else torch.float8_e4m3fn)
        state = {usual.codes_name: codes, usual.scale_name: state[self.format.scale_name]}
        module, name = COMPRESSORS[self.format.bits]
        compressor = library.part(f"compressors.{module}", name)
        values: torch.Tensor = compressor.decompress(state, scheme(self))["weight"]
        return values

    @property
    def has_reference(self) -> bool:
        return not self.format.unused

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        """Nothing in a checkpoint says with which scales it was made."""
        import torch

        from kconvert.formats.reference import mx

        for mse, exact in ((False, True), (False, False), (True, False)):
            codes, scale = in_pieces(partial(mx.encode, bits=self.format.bits, mse=mse, exact=exact), values)
            codes = codes.view(torch.int8) if self.format.codes_dtype == "I8" else codes
            yield {self.format.codes_name: codes, self.format.scale_name: scale}

    def is_quick(self, cols: int) -> bool:
        return True

    def quick_values(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        decode = quick.decode_mxfp4 if self.format.bits == 4 else mxfp8.decode
        return decode(*self._bytes(state), buffers)

    @property
    def judges_quickly(self) -> bool:
        return self.has_reference

    def is_made_of(self, values: torch.Tensor, weight: Weight, first: int, found: State, buffers: Buffers) -> bool:
        is_made_of = quick.is_mxfp4_of if self.format.bits == 4 else mxfp8.is_made_of
        return is_made_of(values, *self._bytes(found))

    def _bytes(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as bytes, which MLX has four of in a word, and exponents."""
        import torch

        return state[self.format.codes_name].view(torch.uint8), state[self.format.scale_name]

    def largest_step(self, state: State) -> torch.Tensor | None:
        largest = quick.powers_of(state[self.format.scale_name].amax().view(1))
        return largest if self.format.bits == 4 else largest * (e4m3_values()[LARGEST] / 16)

    def grid(self) -> tuple[float, ...]:
        return E2M1 if self.format.bits == 4 else e4m3_values()

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        counts = count_bytes(state[self.format.codes_name])
        return nibbles(counts) if self.format.bits == 4 else counts

    def scales(self, state: State) -> torch.Tensor:
        return (state[self.format.scale_name].double() - 127).exp2()

    def group_columns(self, cols: int) -> int:
        return GROUP


class MxStackWitness(Witness[MxStack]):
    """The stack as one matrix of MXFP4."""

    def _matrix(self, state: State, cols: int) -> State:
        codes, scale = state["_blocks"].view(-1, cols // 2), state["_scales"].view(-1, cols // GROUP)
        return {"weight_packed": codes, "weight_scale": scale}

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        return MxWitness(Mx(4)).values(self._matrix(state, shape[1]), shape)

    def grid(self) -> tuple[float, ...]:
        return E2M1

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        return nibbles(count_bytes(state["_blocks"]))

    def scales(self, state: State) -> torch.Tensor:
        return (state["_scales"].double() - 127).exp2()

    def group_columns(self, cols: int) -> int:
        return GROUP
