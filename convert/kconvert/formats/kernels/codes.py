"""What integer formats share: a row's codes, which are spread to a byte each, and the values of a group."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import inline, round_like

USUAL = 32  # values of a group: a loop of this known length is vectors alone, without a remainder


@inline
def spread_nibbles(line: Any, codes: Any) -> None:
    """line u8 [>= cols / 2], the lower nibble first -> codes u8 [cols]."""
    half = codes.shape[0] // 2
    for j in range(half):
        codes[2 * j] = line[j] & np.uint8(15)
        codes[2 * j + 1] = line[j] >> np.uint8(4)
    if codes.shape[0] & 1:
        codes[2 * half] = line[half] & np.uint8(15)


@inline
def decode_group(codes: Any, row: Any, group: Any, offset: Any, scale: Any, like: Any, tile: Any, size: Any) -> None:
    """codes u8 [groups, g] of a row, offset and scale f32 of a group -> tile f32 [rows, groups, g]
    = (code - offset) * scale, rounded as numbers of `like`'s type are."""
    for i in range(size):
        tile[row, group, i] = round_like((np.float32(np.int32(codes[group, i])) - offset) * scale, like)


@inline
def differ(codes: Any, group: Any, offset: Any) -> Any:
    """Whether a code of the group is not its offset."""
    found = False
    for i in range(codes.shape[1]):
        found |= np.float32(np.int32(codes[group, i])) != offset
    return found
