"""`pack-quantized` integers by compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.packed import Packed
from kconvert.models.model import Weight
from kconvert.proof.parity import library
from kconvert.proof.parity.quick import int4
from kconvert.proof.parity.witnesses.base import (
    Encoder,
    State,
    Witness,
    count_bytes,
    in_pieces,
    nibbles,
    scheme,
    without_unused,
)

if TYPE_CHECKING:
    import torch

HELPERS = "compressors.pack_quantized.helpers"


class PackedWitness(Witness[Packed]):
    has_many_spellings = True

    def arguments(self) -> dict[str, Any]:
        size = self.format.group_size
        common = {"num_bits": self.format.bits, "symmetric": self.format.symmetric, "group_size": size}
        return {**common, "strategy": "group" if size else "channel"}

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        format = self.format
        state = {**without_unused(format, state), "weight_shape": torch.tensor(shape)}
        if not format.symmetric and format.zero_dtype == "I8":
            pack_to_int32 = library.part(HELPERS, "pack_to_int32")
            state["weight_zero_point"] = pack_to_int32(state["weight_zero_point"], format.bits, packed_dim=0)
        if not format.symmetric and len(state["weight_zero_point"]) == 1:
            # compressed-tensors cannot unpack a single word down the rows; it cuts off what is too much.
            state["weight_zero_point"] = state["weight_zero_point"].repeat(2, 1)
        if format.ordered:
            return self._unordered(state, shape)
        compressor = library.part("compressors.pack_quantized.base", "PackedQuantizationCompressor")
        values: torch.Tensor = compressor.decompress(state, scheme(self))["weight"]
        return values

    def _unordered(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """compressed-tensors unpacks weights with a g_idx, but no longer multiplies them by the scales of its groups."""
        unpack_from_int32 = library.part(HELPERS, "unpack_from_int32")
        bits, scale, groups = self.format.bits, state["weight_scale"], state["weight_g_idx"].long()
        codes = unpack_from_int32(state["weight_packed"], bits, shape).to(scale.dtype)
        if not self.format.symmetric:
            zero = unpack_from_int32(state["weight_zero_point"], bits, scale.shape, packed_dim=0)
            codes = codes - zero[:, groups].to(scale.dtype)
        values: torch.Tensor = codes * scale[:, groups]
        return values

    def products(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        format, scale = self.format, state["weight_scale"].float()
        if not format.symmetric or format.ordered:
            return super().products(state, shape)
        codes = int_codes(format, state["weight_packed"], shape).float()
        scale = scale.view(shape[0], -1).repeat_interleave(self.group_columns(shape[1]), 1)
        return codes * scale[:, : shape[1]]

    @property
    def has_reference(self) -> bool:
        format = self.format
        kind = (format.bits, format.symmetric, format.ordered, format.scale_dtype) == (4, True, False, "BF16")
        return kind and not format.unused

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        """Nothing in a checkpoint says by which convention it was made, from exact values, or with which scales."""
        from kconvert.formats.reference import packed

        size = self.format.group_size or values.shape[1]
        encoders: tuple[Encoder, ...] = (packed.encode_exact, packed.encode, packed.encode_mse)
        for encode in encoders:
            for rule in CONVENTIONS.values():
                codes, scale = in_pieces(partial(encode, group_size=size, rule=rule), values)
                yield {"weight_packed": codes, "weight_scale": scale}

    def is_quick(self, cols: int) -> bool:
        return self.has_reference and cols % 8 == 0 and self.group_columns(cols) % 2 == 0

    def quick_values(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        return int4.decode(state["weight_packed"], state["weight_scale"], cols, buffers)

    def quick_products(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        import torch

        return int4.decode(state["weight_packed"], state["weight_scale"], cols, buffers, torch.float32)

    def largest_step(self, state: State) -> torch.Tensor | None:
        return state["weight_scale"]  # codes are -8 to 7

    def grid(self) -> tuple[float, ...]:
        half = 2 ** (self.format.bits - 1)
        return tuple(float(code) for code in range(-half, half))

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        bits, words = self.format.bits, state["weight_packed"]
        if shape[1] * bits % 32 == 0:
            counts = count_bytes(words)
            return nibbles(counts) if bits == 4 else counts
        codes = int_codes(self.format, words, shape).long() + 2 ** (bits - 1)
        return torch.bincount(codes.view(-1), minlength=2**bits)

    def group_columns(self, cols: int) -> int:
        return self.format.group_size or cols


def int_codes(format: Packed, words: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The codes of `pack-quantized` words, int8 [rows, cols] = `shape`."""
    unpack_from_int32 = library.part(HELPERS, "unpack_from_int32")
    codes: torch.Tensor = unpack_from_int32(words.reshape(shape[0], -1), format.bits, shape)
    return codes
