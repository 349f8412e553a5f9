"""Symmetric INT4 as compressed-tensors decodes it: bf16 codes times bf16 scales. A table has the values of two bytes, another
counts them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import look_up, piece_rows, take

if TYPE_CHECKING:
    import torch


def decode(words: torch.Tensor, scale: torch.Tensor, cols: int, buffers: Buffers) -> torch.Tensor:
    """I32 [rows, cols / 8] and bf16 or f32 [rows, groups] -> [rows, cols] in the scale's dtype, in memory of `buffers`.

    With bf16 scales widened to f32 nothing rounds.
    """
    import torch

    rows, groups = scale.shape
    values = take(buffers, "values", scale.dtype, (rows, cols))
    size = cols // max(groups, 1)
    count = piece_rows(size) if size % 4 == 0 else groups
    # In two dimensions: torch is twice as fast with them as with three.
    steps = torch.split(scale.view(-1, 1), count)
    targets = torch.split(values.view(-1, size), count)
    codes = look_up(_four_nibbles(), words.view(torch.uint16), count * size // 4, buffers)
    for four, step, target in zip(codes, steps, targets, strict=True):
        torch.mul(four.view(torch.bfloat16).view(target.shape), step, out=target)
    return values


@cache
def _four_nibbles() -> torch.Tensor:
    """int64 [2^16]: the bits of four bf16, by two bytes of INT4 codes."""
    import torch

    pairs = torch.arange(1 << 16)
    codes = torch.stack([(pairs >> shift & 15) - 8 for shift in (0, 4, 8, 12)], 1)
    return codes.bfloat16().view(torch.int64).view(-1)


class Levels(NamedTuple):
    """What a row of INT4 holds, whichever its order: f32 [rows, 8 * groups], the magnitudes of the codes 1 to 8, as they are
    decoded, and the square roots of how often each occurs."""

    magnitudes: torch.Tensor
    roots: torch.Tensor


def levels(words: torch.Tensor, scale: torch.Tensor, cols: int, buffers: Buffers) -> Levels | None:
    """Of I32 [rows, cols / 8] and bf16 [rows, groups]; None of groups so long that a byte cannot count their values."""
    import torch

    rows, groups = scale.shape
    size = cols // groups
    if size % 4 or size > 252:
        return None
    shape = rows, 8, groups
    magnitudes, roots = (take(buffers, use, torch.float32, shape) for use in ("magnitudes", "roots"))
    count, table = piece_rows(cols), _four_counts()
    places = take(buffers, "places", torch.int32, (size // 4, count * groups))
    entries = take(buffers, "entries", torch.int64, (places.numel(),))
    steps = torch.arange(1, 9).bfloat16().view(1, 8, 1)
    pieces = (torch.split(each, count) for each in (words.view(torch.uint16), scale, magnitudes, roots))
    for piece, step, sizes, root in zip(*pieces, strict=True):
        if len(piece) < count:
            places = take(buffers, "places", torch.int32, (size // 4, len(piece) * groups))
            entries = entries[: places.numel()]
        # Across, so that sums are of long rows.
        torch.index_select(table, 0, places.copy_(piece.view(-1, size // 4).T).view(-1), out=entries)
        counts = entries.view(size // 4, -1).sum(0).view(torch.uint8).view(-1, groups, 8)
        root.copy_(counts.transpose(1, 2)).sqrt_()
        sizes.copy_(step.abs().unsqueeze(1) * steps)
    return Levels(magnitudes.view(rows, -1), roots.view(rows, -1))


@cache
def _four_counts() -> torch.Tensor:
    """int64 [2^16]: how often the magnitudes 1 to 8 occur, a byte for each, by two bytes of INT4 codes."""
    import torch

    pairs = torch.arange(1 << 16)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for shift in (0, 4, 8, 12):
        size = ((pairs >> shift & 15) - 8).abs()
        counts += torch.where(size > 0, 1 << (8 * (size - 1).clamp(min=0)), 0)
    return counts
