"""Weights for AMX tiles; see formats.engines.amx for the order of bytes and the rules of the scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kconvert.formats.conventions import AMX_FACTORS, AMX_START, AMX_STRIDES

TINY = 2.0**-126
LANES = 64


def encode(weight: torch.Tensor, bits: int, mse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, k] of any floating dtype, rounded to bf16 first -> (I8 [n * k * bits / 8] in AMX order, f32 scale [n])."""
    codes, scale = codes_and_scale(weight, bits, mse)
    return pack(codes, bits), scale


def codes_and_scale(weight: torch.Tensor, bits: int, mse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same before packing: (int8 codes [n, k], f32 scale [n])."""
    values = _flush(weight.bfloat16().float())
    scale = rule_scale(values.abs().amax(-1), bits)
    if mse:
        scale = search(scale, partial(_error, values, scale, bits))
    return quantise(values, scale, bits, nearest=mse), scale


def rule_scale(amax: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale by amax, f32 [n] each."""
    return _flush(amax / 112 if bits == 4 else amax * torch.tensor(1 / 127))


def quantise(values: torch.Tensor, scale: torch.Tensor, bits: int, nearest: bool) -> torch.Tensor:
    """f32 [n, k] and scale [n] -> int8 codes [n, k]; all zero where the scale is.

    round_half_even(value * (1 / scale)) with f32 reciprocal and product, clamped to eight bits. For four bits it is `nearest`
    with 16 scales in place of one, clamped to [-7, 7]; or kt-kernel's: the magnitude + 8, shifted right by four.
    """
    inverse = torch.where(scale > 0, 1 / scale, 0).unsqueeze(-1)
    if bits == 4 and nearest:
        return (values * (inverse / 16)).round_().clamp_(-7, 7).to(torch.int8)
    codes = (values * inverse).round_().clamp_(-127, 127).to(torch.int16)
    if bits == 4:
        codes = codes.sign() * ((codes.abs() + 8) >> 4)
    return codes.to(torch.int8)


def decode(packed: torch.Tensor, scale: torch.Tensor, cols: int, bits: int) -> torch.Tensor:
    """What the loader serves: code * scale for eight bits, code * 16 * scale for four, rounded to f32 once; [n, cols]."""
    step = scale * (16 if bits == 4 else 1)
    return unpack(packed, len(scale), cols, bits).float() * step.unsqueeze(-1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [n, k] -> I8 [n * k * bits / 8]."""
    n, k = codes.shape
    blocks = [_order(_combine(codes[rows, cols], bits)) for rows, cols in _blocks(n, k, bits)]
    return torch.cat(blocks) if blocks else codes.flatten()


def unpack(packed: torch.Tensor, n: int, k: int, bits: int) -> torch.Tensor:
    """I8 [n * k * bits / 8] -> int8 codes [n, k]."""
    codes = torch.empty(n, k, dtype=torch.int8, device=packed.device)
    position = 0
    for rows, cols in _blocks(n, k, bits):
        target = codes[rows, cols]
        size = target.numel() * bits // 8
        target[:] = _separate(_rows(packed[position : position + size], len(target)), bits)
        position += size
    return codes


def _blocks(n: int, k: int, bits: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of 128 rows for four bits, 64 for eight, times 3584 columns; the last ones may be short."""
    height = 512 // bits
    for row in range(0, n, height):
        for col in range(0, k, 3584):
            yield slice(row, min(row + height, n)), slice(col, min(col + 3584, k))


def _combine(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [rows, cols] -> the bytes of the rows: of 128 four-bit codes the first 64 are low nibbles, the others high."""
    if bits == 8:
        return codes
    low, high = codes.view(len(codes), -1, 2, 64).unbind(2)
    return ((low & 15) | (high << 4)).flatten(1)


def _separate(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of _combine, with sign."""
    if bits == 8:
        return rows
    groups = rows.view(len(rows), -1, 64)
    return torch.stack([(groups << 4) >> 4, groups >> 4], 2).flatten(1)


def _order(rows: torch.Tensor) -> torch.Tensor:
    """int8 [rows, width] of a block -> [rows * width]: for 32 rows and 64 bytes of each, twice 16 x 16 words of four bytes,
    transposed."""
    words = rows.contiguous().view(torch.int32).view(len(rows) // 32, 2, 16, -1, 16)
    return words.permute(0, 3, 1, 4, 2).flatten().view(torch.int8)


def _rows(block: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of _order."""
    words = block.view(torch.int32).view(rows // 32, -1, 2, 16, 16)
    return words.permute(0, 2, 4, 1, 3).reshape(rows, -1).view(torch.int8)


def _flush(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.hardshrink(values, TINY - 2.0**-149)


def flushed(scale: torch.Tensor) -> torch.Tensor:
    """bool [n]: whether a scale counts as zero."""
    return _flush(scale) == 0


def search(rule: torch.Tensor, error: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The scale rule * AMX_FACTORS[i] with the least squared error, f32 [n]: in large strides until it grows, then in small
    ones. `error` gives the squared errors for a factor."""
    factors = torch.tensor(AMX_FACTORS)
    best = torch.full((len(rule),), AMX_START)
    least = error(factors[best])
    walking = torch.ones(len(rule), dtype=torch.bool)
    for place in range(AMX_START + AMX_STRIDES[0], len(factors), AMX_STRIDES[0]):
        if not walking.any():
            break
        found = error(factors[place])
        walking &= found < least
        best, least = torch.where(walking, place, best), torch.where(walking, found, least)
    for stride in AMX_STRIDES[1:]:
        for places in (best - stride, best + stride):
            found = error(factors[places])
            best, least = torch.where(found < least, places, best), torch.minimum(found, least)
    return rule * factors[best]


def _error(values: torch.Tensor, rule: torch.Tensor, bits: int, factor: torch.Tensor) -> torch.Tensor:
    """f32 [n]: squared error of the rows under the scale rule * factor, in units of the rule's code; infinite where that
    scale would be flushed.

    Summed in f32 in a fixed order: columns equal modulo LANES one after the other, then halves onto halves.
    """
    scale = rule * factor
    inverse = (1 / (scale * (16 if bits == 4 else 1))).unsqueeze(-1)
    highest = 7 if bits == 4 else 127
    exact = values * inverse
    codes = exact.clamp(-highest, highest).round_()
    squares = exact.sub_(codes).square_().view(len(values), -1, LANES)
    sums = torch.zeros(len(values), LANES)
    for chunk in squares.unbind(1):
        sums += chunk
    return total_error(sums, scale, factor)


def total_error(sums: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """f32 [n] from the sums of each lane, [n, LANES]."""
    lanes = sums.numpy()
    while (half := lanes.shape[1] // 2) > 0:
        lanes = lanes[:, :half] + lanes[:, half:]
    return torch.where(flushed(scale), torch.inf, torch.from_numpy(lanes[:, 0]) * (factor * factor))
