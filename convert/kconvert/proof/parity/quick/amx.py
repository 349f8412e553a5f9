"""AMX codes and scales as the reference makes them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import largest, piece_rows, take

if TYPE_CHECKING:
    import torch

TINY = 2.0**-90  # rows with no more than this may have values that count as zero


def codes_and_scale(values: torch.Tensor, bits: int, mse: bool, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [n, k] -> int8 codes [n, k], f32 scale [n], in memory of `buffers`."""
    import torch

    from kconvert.formats.reference import amx as reference

    rows, cols = values.shape
    amax = largest(values, 1, cols).view(-1).float()
    if cols % reference.LANES or bool(((amax > 0) & (amax < TINY)).any()):
        return reference.codes_and_scale(values, bits, mse)
    scale = reference.rule_scale(amax, bits)
    count = piece_rows(cols)
    codes = take(buffers, "codes", torch.int8, (rows, cols))
    floats = take(buffers, "floats", torch.float32, (count, cols))
    for piece, step, target in zip(*(torch.split(each, count) for each in (values, scale, codes)), strict=True):
        if mse:
            step.copy_(_searched(piece, step, bits, buffers))
        target.copy_(reference.quantise(floats[: len(piece)].copy_(piece), step, bits, nearest=mse))
    return codes, scale


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
