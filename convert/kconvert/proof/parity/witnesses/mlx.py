"""MLX's affine integers by torch: bit by bit, product and sum by its operators; and what lies by heads or in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.engines.heads import Heads
from kconvert.formats.engines.mlx import Affine
from kconvert.formats.engines.turns import Turns
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.proof.parity.quick import mlx as quick
from kconvert.proof.parity.quick.memory import piece_rows
from kconvert.proof.parity.witnesses.base import State, Witness, count_bytes, nibbles
from kconvert.proof.parity.witnesses.dense import DenseWitness
from kconvert.proof.parity.witnesses.mx import MxWitness

if TYPE_CHECKING:
    import torch


class AffineWitness(Witness[Affine]):
    by_library = False
    loses_signs = True

    def claims(self, source: Format) -> bool:
        return True

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        size = self.format.group_size
        scales, biases = (state[suffix].float().unsqueeze(-1) for suffix in ("scales", "biases"))
        values = torch.empty(shape, dtype=torch.bfloat16)
        count = piece_rows(shape[1])
        for first in range(0, shape[0], count):
            piece = slice(first, first + count)
            codes = self._codes(state["weight"][piece]).view(-1, shape[1] // size, size)
            values[piece] = (codes.float() * scales[piece] + biases[piece]).flatten(1)
        return values

    def is_quick(self, cols: int) -> bool:
        return self.format.bits == 4 and self.format.group_size % 4 == 0

    def quick_values(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        scales, biases = (state[suffix].float() for suffix in ("scales", "biases"))
        return quick.decode(state["weight"], scales, biases, cols, buffers)

    def copies(self, found: State, source: Format, state: State) -> bool:
        """Those of INT4, whose words are the same."""
        if not isinstance(source, Packed) or not source.symmetric or source.ordered:
            return False
        if (source.bits, source.group_size) != (4, self.format.group_size) or self.format.bits != 4:
            return False
        sides = state["weight_packed"], state["weight_scale"], *(found[name] for name in ("weight", "scales", "biases"))
        return quick.is_int4(*sides)

    def _codes(self, words: torch.Tensor) -> torch.Tensor:
        """int32 [rows, cols] of words [rows, n]."""
        import torch

        bits = self.format.bits
        octets = words.contiguous().view(torch.uint8).to(torch.int32)
        places = torch.arange(8, dtype=torch.int32)
        single = (octets.unsqueeze(-1) >> places).bitwise_and_(1).flatten(1).reshape(len(words), -1, bits)
        codes: torch.Tensor = (single << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)
        return codes

    def grid(self) -> tuple[float, ...]:
        return tuple(float(code) for code in range(2**self.format.bits))

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        bits, words, count = self.format.bits, state["weight"], piece_rows(shape[1])
        if bits in (4, 8):
            counts = count_bytes(words)
            return nibbles(counts) if bits == 4 else counts
        pieces = (self._codes(words[first : first + count]).flatten() for first in range(0, shape[0], count))
        return torch.stack([torch.bincount(codes, minlength=2**bits) for codes in pieces]).sum(0)

    def scales(self, state: State) -> torch.Tensor:
        return state["scales"].float()

    def group_columns(self, cols: int) -> int:
        return self.format.group_size


class HeadsWitness(Witness[Heads]):
    by_library = False

    def claims(self, source: Format) -> bool:
        return True

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        heads, pieces = shape[0] // self.format.height_of_head, []
        for piece in self.format.pieces:
            rows, cols = piece.matrix(shape[1])
            values = _inner(piece.format, state, f"{piece.name}.", (heads * rows, cols)).view(heads, rows, cols)
            pieces.append(values.mT if piece.transposed else values)
        return torch.cat(pieces, 1).reshape(shape)


class TurnsWitness(Witness[Turns]):
    by_library = False

    def claims(self, source: Format) -> bool:
        return True

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        rows = shape[0] // len(self.format.names)
        halves = []
        for name in self.format.names:
            head, _, last = name.partition(".")
            mine = (
                {suffix.replace(".bias", ".weight"): tensor for suffix, tensor in state.items()}
                if last == "bias"
                else state
            )
            halves.append(_inner(self.format.format, mine, f"{head}.", (rows, shape[1])))
        return torch.stack(halves, 1).reshape(shape)


def _inner(format: Format, state: State, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """The values of the half whose suffixes begin with `name`."""
    own = {
        suffix.removeprefix(name): tensor.reshape(shape[0], -1)
        for suffix, tensor in state.items()
        if suffix.startswith(name)
    }
    witness: Witness[Any]
    if isinstance(format, Dense):
        witness = DenseWitness(format)
    else:
        witness = MxWitness(format) if isinstance(format, Mx) else AffineWitness(format)  # type: ignore[arg-type]
    return witness.values(own, shape)
