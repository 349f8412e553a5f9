"""AMX weights, which no library knows, by the reference, whose bytes are kt-kernel's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats.engines.amx import Amx
from kconvert.models.model import Weight
from kconvert.proof.parity.metrics import same_bits
from kconvert.proof.parity.quick import amx as quick
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.witnesses.base import (
    Encoder,
    State,
    Witness,
    count_bytes,
    in_pieces,
    nibbles,
    signed,
)

if TYPE_CHECKING:
    import torch


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

    def is_quick(self, cols: int) -> bool:
        return True

    def quick_values(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        import torch

        format = self.format
        shards = [(state[f"numa.{n}.weight"], state[f"numa.{n}.scale"]) for n in range(format.numa)]
        rows = sum(len(scale) for _, scale in shards) if format.split == "rows" else len(shards[0][1])
        values, row, first = take(buffers, "values", torch.float32, (rows, cols)), 0, 0
        width = cols if format.split == "rows" else cols // format.numa
        for packed, scale in shards:
            quick.decode(packed, scale, values[row : row + len(scale)], first, width, format.bits, buffers)
            row, first = (row + len(scale), 0) if format.split == "rows" else (0, first + width)
        return values

    @property
    def has_reference(self) -> bool:
        return True

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        from kconvert.formats.reference import amx

        for mse in (False, True) if self.format.mse is None else (self.format.mse,):
            encode = partial(amx.codes_and_scale, bits=self.format.bits, mse=mse)
            yield self._parts(values, weight, first, partial(in_pieces, encode))

    @property
    def judges_quickly(self) -> bool:
        return self.format.mse is not None

    def is_made_of(self, values: torch.Tensor, weight: Weight, first: int, found: State, buffers: Buffers) -> bool:
        """By what is known of its scales."""
        format, cols = self.format, values.shape[1]
        together = 1 if format.split == "rows" else format.numa // format.pieces
        width = cols // together
        for n in range(together):
            lines, scale = quick.encode(values, n * width, width, format.bits, bool(format.mse), buffers)
            if not all(self._is_shard(weight, first, found, k, lines, scale) for k in self._shards_of(n)):
                return False
        return True

    def _shards_of(self, together: int) -> range:
        """The shards that were quantised together."""
        format = self.format
        return (
            range(format.numa)
            if format.split == "rows"
            else range(together * format.pieces, (together + 1) * format.pieces)
        )

    def _is_shard(
        self, weight: Weight, first: int, found: State, n: int, lines: torch.Tensor, scale: torch.Tensor
    ) -> bool:
        """Whether shard `n` was cut from the bytes of these rows."""
        format, start, width = self.format, 0, lines.shape[1]
        if format.split == "rows":
            begin, end = weight.parts[2 * n].rows or (0, weight.rows)
            own = slice(max(begin - first, 0), max(end - first, 0))
            lines, scale = lines[own], scale[own]
        else:
            width //= format.pieces
            start = n % format.pieces * width
        packed = found[f"numa.{n}.weight"]
        return same_bits(scale, found[f"numa.{n}.scale"]) and quick.is_packed(lines, start, width, packed, format.bits)

    def _parts(self, values: torch.Tensor, weight: Weight, first: int, quantise: Encoder) -> State:
        """Codes and scales that `quantise` makes of what was quantised together, cut into the shards in which it is."""
        from kconvert.formats.reference import amx

        format, state = self.format, {}

        def add(n: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
            state[f"numa.{n}.weight"], state[f"numa.{n}.scale"] = amx.pack(codes, format.bits), scale

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

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        counts = count_bytes(_of_shards(state, "weight"))
        return nibbles(counts) if self.format.bits == 4 else counts

    def scales(self, state: State) -> torch.Tensor:
        return _of_shards(state, "scale")

    def group_columns(self, cols: int) -> int:
        return cols // (self.format.numa // self.format.pieces) if self.format.split == "cols" else cols


def _of_shards(state: State, suffix: str) -> torch.Tensor:
    """What the shards of a weight have of this, one after the other."""
    import torch

    return torch.cat([tensor for name, tensor in state.items() if name.endswith(suffix)])
