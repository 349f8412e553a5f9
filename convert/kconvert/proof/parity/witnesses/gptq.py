"""GPTQ's and AWQ's integers by torch, as AutoGPTQ's and AutoAWQ's slow layers unpack them: with shifts, or bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kconvert.formats.gptq import Gptq
from kconvert.proof.parity.quick.memory import piece_rows
from kconvert.proof.parity.witnesses.base import State, Witness

if TYPE_CHECKING:
    import torch

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class GptqWitness(Witness[Gptq]):
    by_library = False

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        rows, cols = shape
        groups = state.get("g_idx")
        if groups is None:
            groups = torch.arange(cols, dtype=torch.int32) // (self.format.group_size or max(cols, 1))
        zeros = self._zeros(state["qzeros"])[:, :rows].T.contiguous()
        steps = state["scales"].float().T.contiguous()
        values = torch.empty(shape, dtype=torch.bfloat16)
        for first, codes in self._codes(state, shape):
            last = first + len(codes)
            difference = codes.sub_(zeros[first:last].index_select(1, groups)).float()
            values[first:last] = difference.mul_(steps[first:last].index_select(1, groups))
        return values

    def _codes(self, state: State, shape: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row and int32 [rows, cols] of some rows at a time, as many as fit into a core's cache."""
        rows, cols = shape
        count = math.ceil(piece_rows(cols) / 8) * 8
        for first in range(0, rows, count):
            last = min(first + count, rows)
            if self.format.interleaved:
                yield first, _awq(state["qweight"][:, first // 8 : last // 8]).T.contiguous()
            else:
                words = state["qweight"][:, first:last].T.contiguous()
                yield first, _stream(words, self.format.bits)[:, :cols].contiguous()

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """int32 [groups, rows and perhaps some more]."""
        import torch

        bits, top = self.format.bits, 2**self.format.bits - 1
        if self.format.interleaved:
            return _awq(words)
        if self.format.spelling == "gptqmodel" and bits in (2, 4, 8):
            wrapped = words.long() + (2**32 - 1) // top  # its `qzeros += 0b0001…0001`
            return _stream(wrapped.bitwise_and(0xFFFFFFFF).to(torch.uint32).view(torch.int32), bits)
        stored = _stream(words, bits)
        if self.format.spelling == "gptq_v2":
            return stored
        return stored + 1 if self.format.spelling == "auto-round" else (stored + 1).bitwise_and(top)

    def grid(self) -> tuple[float, ...]:
        half = 2 ** (self.format.bits - 1)
        return tuple(float(code) for code in range(-half, half))

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        size = 2**self.format.bits
        counts = [torch.bincount(codes.flatten(), minlength=size) for _, codes in self._codes(state, shape)]
        return torch.stack(counts).sum(0)

    def scales(self, state: State) -> torch.Tensor:
        return state["scales"].float()

    def group_columns(self, cols: int) -> int:
        return self.format.group_size or cols


def _stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """I32 [n, words] -> int32 [n, codes], the lowest bits of a word first."""
    import torch

    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return (words.unsqueeze(-1) >> shifts).bitwise_and_(2**bits - 1).flatten(1)
    places = torch.arange(32, dtype=torch.int32)
    single = (words.unsqueeze(-1) >> places).bitwise_and_(1).flatten(1)
    single = single[:, : single.shape[1] // bits * bits].reshape(len(words), -1, bits)
    codes: torch.Tensor = (single << places[:bits]).sum(-1, dtype=torch.int32)
    return codes


def _awq(words: torch.Tensor) -> torch.Tensor:
    """I32 [n, words] -> int32 [n, 8 * words]."""
    return _stream(words, 4).view(len(words), -1, 8)[..., AWQ_ORDER].flatten(1)
