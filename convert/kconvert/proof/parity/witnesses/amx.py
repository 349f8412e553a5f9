"""AMX weights, which no library knows, by the reference, whose bytes are kt-kernel's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats.engines.amx import Amx
from kconvert.formats.packed import Packed
from kconvert.models.model import Weight
from kconvert.proof.parity.quick import amx as quick
from kconvert.proof.parity.quick import int4
from kconvert.proof.parity.quick.int4 import Levels
from kconvert.proof.parity.witnesses.base import (
    Encoder,
    Spelling,
    State,
    Witness,
    count_bytes,
    in_pieces,
    nibbles,
    signed,
)
from kconvert.proof.parity.witnesses.packed import PackedWitness

if TYPE_CHECKING:
    import torch

    Packer = Callable[[torch.Tensor, int], torch.Tensor]  # codes and the number of their shard


class AmxWitness(Witness[Amx]):
    by_library = False

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """All shards, side by side as the weight was cut."""
        import torch

        from kconvert.formats.reference import amx

        format, cols = self.format, shape[1]
        by_rows = format.split == "rows"
        width = cols if by_rows else cols // format.numa
        shards = [
            amx.decode(state[f"numa.{n}.weight"], state[f"numa.{n}.scale"], width, format.bits)
            for n in range(format.numa)
        ]
        return torch.cat(shards, 0 if by_rows else 1)

    @property
    def has_reference(self) -> bool:
        return True

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        from kconvert.formats.reference import amx

        for mse in (False, True) if self.format.mse is None else (self.format.mse,):
            encode = partial(amx.codes_and_scale, bits=self.format.bits, mse=mse)
            yield self._parts(values, weight, first, partial(in_pieces, encode))

    @property
    def encodes_quickly(self) -> bool:
        return self.format.mse is not None

    def quick_encoding(
        self, values: torch.Tensor, weight: Weight, first: int, found: State, source: Spelling, buffers: Buffers
    ) -> State | None:
        """By what is known of its scales."""
        bits, mse = self.format.bits, bool(self.format.mse)
        levels = iter(self._levels(values.shape[1], source, buffers) if mse else ())

        def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return quick.codes_and_scale(values, bits, mse, buffers, next(levels, None))

        def pack(codes: torch.Tensor, n: int) -> torch.Tensor:
            return quick.pack(codes, bits, buffers, f"packed.{n}")

        return self._parts(values, weight, first, quantise, pack)

    def _levels(self, cols: int, source: Spelling, buffers: Buffers) -> Iterator[Levels | None]:
        """Of the columns that were quantised together, where the source tells."""
        format, state = source
        if not isinstance(format, Packed) or not PackedWitness(format).is_quick(cols):
            return
        together = 1 if self.format.split == "rows" else self.format.numa // self.format.pieces
        words, scale = state["weight_packed"], state["weight_scale"]
        if scale.shape[1] % together == 0 and words.shape[1] % together == 0:
            for own, step in zip(words.chunk(together, 1), scale.chunk(together, 1), strict=True):
                yield int4.levels(own.contiguous(), step.contiguous(), cols // together, buffers)

    def _parts(
        self, values: torch.Tensor, weight: Weight, first: int, quantise: Encoder, pack: Packer | None = None
    ) -> State:
        """Codes and scales that `quantise` makes of what was quantised together, cut into the shards in which it is."""
        from kconvert.formats.reference import amx

        format, state = self.format, {}

        def add(n: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
            packed = pack(codes, n) if pack else amx.pack(codes, format.bits)
            state[f"numa.{n}.weight"], state[f"numa.{n}.scale"] = packed, scale

        if format.split == "rows":
            codes, scale = quantise(values)
            for n, part in enumerate(weight.parts[::2]):
                begin, end = part.rows or (0, weight.rows)
                own = slice(max(begin - first, 0), max(end - first, 0))
                add(n, codes[own], scale[own])
        else:
            for n, together in enumerate(values.chunk(format.numa // format.pieces, 1)):
                codes, scale = quantise(together)
                for k, shard in enumerate(codes.chunk(format.pieces, 1)):
                    add(n * format.pieces + k, shard, scale)
        return state

    def grid(self) -> tuple[float, ...]:
        return signed(self.format.bits)

    def count_codes(self, state: State, shape: tuple[int, int]) -> list[int]:
        counts = count_bytes(_of_shards(state, "weight"))
        return nibbles(counts) if self.format.bits == 4 else counts.tolist()

    def scales(self, state: State) -> torch.Tensor:
        return _of_shards(state, "scale")

    def group_columns(self, cols: int) -> int:
        return cols // (self.format.numa // self.format.pieces) if self.format.split == "cols" else cols


def _of_shards(state: State, suffix: str) -> torch.Tensor:
    """What the shards of a weight have of this, one after the other."""
    import torch

    return torch.cat([tensor for name, tensor in state.items() if name.endswith(suffix)])
