from __future__ import annotations

import numpy as np
import pytest

from kconvert.formats.conventions import COMPRESSED_TENSORS, KIMI
from kconvert.formats.packed import Packed
from kconvert.targets.synthetic import Dealt, Picks, Synthetic

ROWS, COLS = 48, 256


def spelled(source, target, tiles):
    """The bytes of every part, made tile by tile."""
    parts = target.parts(ROWS, COLS)
    data = [np.zeros(part.nbytes, np.uint8) for part in parts]
    for first in range(0, ROWS, ROWS // tiles):
        last = first + ROWS // tiles
        tile = np.empty((last - first, COLS), np.float32)
        source.decode([], first, tile)
        target.encode(tile, [d[slice(*p.span(ROWS, first, last))] for d, p in zip(data, parts, strict=True)])
    return [d.tobytes() for d in data]


@pytest.mark.parametrize("convention", [KIMI, COMPRESSED_TENSORS])
@pytest.mark.parametrize("seed", [0, 7])
def test_dealt_groups_are_the_bytes_that_encoding_the_values_gives(convention, seed):
    packed = Packed(32, None, convention)

    dealt = spelled(Picks("w", seed), Dealt(packed, seed), tiles=1)

    assert dealt == spelled(Synthetic("w", seed), packed, tiles=1)
    assert dealt == spelled(Picks("w", seed), Dealt(packed, seed), tiles=6)
