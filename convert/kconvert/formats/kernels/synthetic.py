"""Made-up values; see targets.synthetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import inline, kernel


@inline
def pick(key: Any, place: Any, count: Any) -> Any:
    """Which of `count` groups (a power of two) lies at `place`: SplitMix64."""
    state = key + np.uint64(place) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((state ^ (state >> np.uint64(31))) & np.uint64(count - 1))


@kernel
def fill_synthetic(pool: Any, key: Any, first_row: Any, center: Any, gain: Any, tile: Any) -> None:
    """tile f32 [rows, cols] = center + gain * groups of 32 picked from pool f32 [n, 32], n a power of two.

    Which group goes where depends on `key` and the place in the weight only, not on how it is tiled.
    """
    groups = (tile.shape[1] + 31) // 32
    for row in range(tile.shape[0]):
        for group in range(groups):
            values = pool[pick(key, (first_row + row) * groups + group, pool.shape[0])]
            target = tile[row, 32 * group : 32 * group + 32]
            for i in range(target.shape[0]):
                target[i] = center + gain * values[i]


@kernel
def fill_picks(count: Any, key: Any, first_row: Any, tile: Any) -> None:
    """The numbers of the groups that fill_synthetic would pick: of each row of tile f32 [rows, cols] the first cols / 32."""
    groups = tile.shape[1] // 32
    for row in range(tile.shape[0]):
        for group in range(groups):
            tile[row, group] = np.float32(pick(key, (first_row + row) * groups + group, count))


@kernel
def deal(pool: Any, tile: Any, out: Any) -> None:
    """out [rows, cols / 32, w] = the rows of pool [n, w] that the picks in tile f32 [rows, cols] name."""
    for row in range(out.shape[0]):
        for group in range(out.shape[1]):
            source = np.int64(tile[row, group])
            for i in range(out.shape[2]):
                out[row, group, i] = pool[source, i]
