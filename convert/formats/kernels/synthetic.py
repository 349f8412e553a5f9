"""Made-up values; see formats.synthetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from kconvert.formats.kernels.bits import kernel


@kernel
def fill_synthetic(pool: Any, key: Any, first_row: Any, center: Any, gain: Any, tile: Any) -> None:
    """tile f32 [rows, cols] = center + gain * groups of 32 picked from pool f32 [n, 32], n a power of two.

    Which group goes where depends on `key` and the place in the weight only (SplitMix64), not on how it is tiled.
    """
    groups = (tile.shape[1] + 31) // 32
    for row in range(tile.shape[0]):
        for group in range(groups):
            state = key + np.uint64((first_row + row) * groups + group) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            values = pool[np.int64((state ^ (state >> np.uint64(31))) & np.uint64(pool.shape[0] - 1))]
            target = tile[row, 32 * group : 32 * group + 32]
            for i in range(target.shape[0]):
                target[i] = center + gain * values[i]
