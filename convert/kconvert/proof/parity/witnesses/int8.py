"""`int-quantized` integers by compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kconvert.formats.int8 import Int8
from kconvert.models.model import Weight
from kconvert.proof.parity import library
from kconvert.proof.parity.witnesses.base import (
    State,
    Witness,
    count_bytes,
    in_pieces,
    nibbles,
    scheme,
    signed,
    without_unused,
)

if TYPE_CHECKING:
    import torch


class Int8Witness(Witness[Int8]):
    def arguments(self) -> dict[str, Any]:
        format = self.format
        common = {"num_bits": format.bits, "symmetric": format.symmetric, "group_size": format.group_size}
        return {**common, "strategy": format.strategy}

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        compressor = library.part("compressors.naive_quantized.base", "IntQuantizationCompressor")
        state = without_unused(self.format, state)
        if self.format.paired:
            state = {**state, "weight": _unpaired(state["weight"])}
        values: torch.Tensor = compressor.decompress(state, scheme(self))["weight"]
        return values

    @property
    def has_reference(self) -> bool:
        format = self.format
        kind = (format.bits, format.strategy, format.symmetric, format.scale_dtype) == (8, "channel", True, "BF16")
        return kind and not format.unused

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        from kconvert.formats.reference import int8

        codes, scale = in_pieces(int8.encode, values)
        yield {"weight": codes, "weight_scale": scale}

    def grid(self) -> tuple[float, ...]:
        return signed(self.format.bits)

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        counts = count_bytes(state["weight"])
        if self.format.paired:
            return nibbles(counts)
        half = 2 ** (self.format.bits - 1)
        return torch.cat([counts[:half], counts[-half:]])

    def group_columns(self, cols: int) -> int:
        return self.format.group_size or cols


def _unpaired(packed: torch.Tensor) -> torch.Tensor:
    """u8 [rows / 2, cols], two rows to a byte -> int8 [rows, cols], by shifts that keep the sign."""
    import torch

    signed_bytes = packed.view(torch.int8)
    return torch.stack(((signed_bytes << 4) >> 4, signed_bytes >> 4), 1).flatten(0, 1)
