"""GPTQ's and AWQ's integers by torch, as AutoGPTQ's and AutoAWQ's slow layers unpack them: with shifts, or bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.formats.gptq import Gptq
from kconvert.proof.parity.witnesses.base import State, Witness

if TYPE_CHECKING:
    import torch

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class GptqWitness(Witness[Gptq]):
    by_library = False

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        rows, cols = shape
        scale, groups = state["scales"].float(), state.get("g_idx")
        if groups is None:
            groups = torch.arange(cols).div(self.format.group_size or max(cols, 1), rounding_mode="floor")
        difference = self._codes(state, shape) - self._zeros(state["qzeros"])[:, :rows][groups.long()]
        return difference.float().mul_(scale[groups.long()]).T.bfloat16().contiguous()

    def _codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """int32 [cols, rows], as they lie."""
        if self.format.interleaved:
            return _awq(state["qweight"])[:, : shape[0]]
        return _stream(state["qweight"].T.contiguous(), self.format.bits).T[: shape[1]]

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

    def count_codes(self, state: State, shape: tuple[int, int]) -> list[int]:
        import torch

        return torch.bincount(self._codes(state, shape).flatten(), minlength=2**self.format.bits).tolist()

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
