from __future__ import annotations

import numpy as np
import pytest

from kconvert.formats.conventions import COMPRESSED_TENSORS, KIMI
from kconvert.formats.packed import Packed
from kconvert.targets.synthetic import Dealt, Integers, Picks, Synthetic, Unquantised

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


@pytest.mark.parametrize("below", [6, 256, 384])
def test_the_integers_of_a_row_are_different_and_below_their_bound(below):
    made = [np.empty((rows, 6), np.float32) for rows in (40, 8)]
    Integers("gate.tid2eid", below).decode([], 0, made[0])
    Integers("gate.tid2eid", below).decode([], 32, made[1])

    assert (made[0][32:] == made[1]).all()
    assert made[0].min() >= 0
    assert made[0].max() < below
    assert all(len(set(row)) == 6 for row in made[0])
    assert len({tuple(row) for row in made[0]}) > below // 10


def test_integers_are_written_whole():
    table = Unquantised("I64", (3, 2))
    data = np.zeros(48, np.uint8)
    table.encode(np.array([[0, 1], [255, 2], [383, 4]], np.float32), [data])
    assert data.view("<i8").tolist() == [0, 1, 255, 2, 383, 4]


def test_a_row_that_is_filled_up_ends_in_zeros():
    decay = Unquantised("F32", (8,), filled=5)
    data = np.zeros(32, np.uint8)
    decay.encode(np.ones((1, 8), np.float32), [data])
    assert data.view("<f4").tolist() == [1] * 5 + [0] * 3
