"""Which part of a stack in MXFP4 has another shape than the model's."""

from __future__ import annotations

import pytest

from kconvert.formats import stacks


@pytest.mark.parametrize("wrong", ["_blocks", "_scales"])
def test_the_part_that_is_too_tall_is_the_one_that_does_not_fit(wrong: str) -> None:
    found = {"_blocks": ("U8", (4, 256, 8, 16)), "_scales": ("U8", (4, 256, 8))}
    dtype, (stack, *rest) = found[wrong]
    found[wrong] = dtype, (stack + 1, *rest)
    format, (rows, cols) = stacks.recognise(None, found, (1024, 256))
    unlike = [part.suffix for part in format.parts(rows, cols) if part.shape != found[part.suffix][1]]
    assert unlike == [wrong]
