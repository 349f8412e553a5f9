"""AMX codes and scales as the reference makes them, and their order.

Of values that were INT4 a group has eight magnitudes at most: the search for the scale of least squared error adds up as many
squares, each times the number of values that it is of. Sums in another order than the reference's may differ in their last
bits; rows in which that could decide are left to its order.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import largest, piece_rows, take

if TYPE_CHECKING:
    import torch

    from kconvert.proof.parity.quick.int4 import Levels

TINY = 2.0**-90  # rows with no more than this may have values that count as zero
ROUNDING = 2.0**-22  # of four additions of f32


def codes_and_scale(
    values: torch.Tensor, bits: int, mse: bool, buffers: Buffers, levels: Levels | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [n, k] -> int8 codes [n, k], f32 scale [n], in memory of `buffers`; `levels` are those of the values."""
    import torch

    from kconvert.formats.reference import amx as reference

    cols = values.shape[1]
    amax = largest(values, 1, cols).view(-1).float()
    if cols % reference.LANES or bool(((amax > 0) & (amax < TINY)).any()) or not bool(amax.isfinite().all()):
        return reference.codes_and_scale(values, bits, mse)
    scale = reference.rule_scale(amax, bits)
    if mse and levels is not None:
        scale, doubtful = _searched_by_levels(levels, scale, bits, cols, buffers)
        if len(doubtful):
            rule = reference.rule_scale(amax[doubtful], bits)
            scale[doubtful] = _searched(values[doubtful], rule, bits, buffers)
    elif mse:
        pieces = (torch.split(each, piece_rows(cols)) for each in (values, scale))
        scale = torch.cat([_searched(piece, rule, bits, buffers) for piece, rule in zip(*pieces, strict=True)])
    return _codes(values, scale, bits, mse, buffers), scale


def _codes(values: torch.Tensor, scale: torch.Tensor, bits: int, mse: bool, buffers: Buffers) -> torch.Tensor:
    """The reference's `quantise`."""
    import torch

    from kconvert.formats.reference.amx import quantise

    count = piece_rows(values.shape[1])
    codes = take(buffers, "codes", torch.int8, tuple(values.shape))
    floats = take(buffers, "floats", torch.float32, (count, values.shape[1]))
    inverse = torch.where(scale > 0, 1 / scale, 0).unsqueeze(-1)
    inverse = inverse / 16 if bits == 4 else inverse
    highest = 7 if bits == 4 else 127
    pieces = (torch.split(each, count) for each in (values, scale, inverse, codes))
    for piece, step, factor, target in zip(*pieces, strict=True):
        wide = floats[: len(piece)].copy_(piece)
        if bits == 4 and not mse:
            target.copy_(quantise(wide, step, bits, nearest=False))
        else:
            target.copy_(wide.mul_(factor).clamp_(-highest, highest).round_())
    return codes


def _searched_by_levels(
    levels: Levels, rule: torch.Tensor, bits: int, values_in_row: int, buffers: Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of least squared error, f32 [n], and the numbers of the rows whose sums are too near to each other to tell."""
    import torch

    from kconvert.formats.reference.amx import LANES, search

    cols = levels.magnitudes.shape[1]
    tolerance = (values_in_row / LANES + 16) * ROUNDING
    found, doubtful = [], []
    for magnitudes, roots, own in zip(
        *(torch.split(each, piece_rows(cols)) for each in (levels.magnitudes, levels.roots, rule)), strict=True
    ):
        room = [take(buffers, use, torch.float32, tuple(magnitudes.shape)) for use in ("exact", "nearest")]
        seen: list[torch.Tensor] = []
        found.append(search(own, partial(_level_error, magnitudes, roots, room, own, bits, seen)))
        errors = torch.stack(seen).sort(0).values
        near = (errors[1:] - errors[:-1] <= tolerance * errors[1:]) & errors[1:].isfinite()
        doubtful.append(near.any(0) & (own > 0))
    return torch.cat(found), torch.cat(doubtful).nonzero().view(-1)


def _level_error(
    magnitudes: torch.Tensor,
    roots: torch.Tensor,
    room: list[torch.Tensor],
    rule: torch.Tensor,
    bits: int,
    seen: list[torch.Tensor],
    factor: torch.Tensor,
) -> torch.Tensor:
    """The reference's error but for the order of the sum, which is kept in `seen`."""
    import torch

    from kconvert.formats.reference.amx import flushed

    exact, codes = room
    scale = rule * factor
    torch.mul(magnitudes, (1 / (scale * (16 if bits == 4 else 1))).unsqueeze(-1), out=exact)
    torch.clamp_max(exact, 7 if bits == 4 else 127, out=codes).round_()
    noise = torch.linalg.vector_norm(exact.sub_(codes).mul_(roots), dim=-1).square_()
    seen.append(torch.where(flushed(scale), torch.inf, noise * (factor * factor)))
    return seen[-1]


def _searched(values: torch.Tensor, rule: torch.Tensor, bits: int, buffers: Buffers) -> torch.Tensor:
    """The scales of least squared error, f32 [n]. Columns are put in the order in which their errors are to be added."""
    import torch

    from kconvert.formats.reference.amx import LANES, search

    rows, cols = values.shape
    shape = cols // LANES, rows, LANES
    lanes, exact, codes = (take(buffers, use, torch.float32, shape) for use in ("lanes", "exact", "nearest"))
    lanes.copy_(values.view(rows, -1, LANES).transpose(0, 1))
    return search(rule, partial(_error, lanes, exact, codes, rule, bits))


def _error(
    lanes: torch.Tensor, exact: torch.Tensor, codes: torch.Tensor, rule: torch.Tensor, bits: int, factor: torch.Tensor
) -> torch.Tensor:
    """The reference's, of f32 [cols / LANES, n, LANES]; `exact` and `codes` are room for as much."""
    import torch

    from kconvert.formats.reference.amx import total_error

    highest = 7 if bits == 4 else 127
    scale = rule * factor
    torch.mul(lanes, (1 / (scale * (16 if bits == 4 else 1))).view(1, -1, 1), out=exact)
    torch.clamp(exact, -highest, highest, out=codes).round_()
    exact.sub_(codes).square_()
    # numpy adds along the first axis in its order, torch in another.
    return total_error(torch.from_numpy(exact.numpy().sum(0)), scale, factor)


def pack(codes: torch.Tensor, bits: int, buffers: Buffers, use: str) -> torch.Tensor:
    """The reference's, all blocks at once, in memory of `buffers` for `use`."""
    import torch

    from kconvert.formats.reference import amx as reference

    if not codes.numel():
        return reference.pack(codes, bits)
    rows = len(codes)
    words = (_paired(codes) if bits == 4 else codes.contiguous()).view(torch.int32)
    height, width = 512 // bits, 112 * bits
    wide = words.shape[1] > width
    if wide and (words.shape[1] % width or rows % height):
        return reference.pack(codes, bits)
    down, across = (rows // height, words.shape[1] // width) if wide else (1, 1)
    blocks = words.view(down, rows // down // 32, 2, 16, across, -1, 16).permute(0, 4, 1, 5, 2, 6, 3)
    return take(buffers, use, torch.int32, tuple(blocks.shape)).copy_(blocks).flatten().view(torch.int8)


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """int8 [rows, cols] -> the bytes of the rows, see the reference; eight codes at a time."""
    import torch

    low, high = codes.contiguous().view(torch.int64).view(len(codes), -1, 2, 8).unbind(2)
    return (low & 0x0F0F0F0F0F0F0F0F).bitwise_or_((high & 0x0F0F0F0F0F0F0F0F) << 4).view(len(codes), -1)
