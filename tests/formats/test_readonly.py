"""Decoding from memory that cannot be written to, as bytes are that were read for a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kconvert.formats.gptq import Gptq
from kconvert.formats.packed import Packed


@pytest.mark.parametrize("format", [Packed(32), Packed(32, bits=8), Gptq(32)], ids=lambda format: format.label)
def test_codes_are_decoded_where_they_lie(format: Any) -> None:
    random = np.random.default_rng(0)
    parts = format.parts(64, 128)
    data = [random.integers(0, 64, part.nbytes, np.uint8) for part in parts]  # no scale is zero, infinite or none
    tiles = [np.empty((64, 128), np.float32) for _ in range(2)]
    for tile, copies in zip(tiles, (data, [np.frombuffer(part.tobytes(), np.uint8) for part in data]), strict=True):
        format.decode(copies, 0, tile)
    assert np.array_equal(*tiles)
