"""No code becomes a subnormal number on the way to its value: Intel's cores take twenty times as long for those, and a thread
that flushes them to zero would have other values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats import Format
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.models.model import Weight
from kconvert.proof.parity.oracle import quick_values

ROWS, COLS = 128, 256


@contextmanager
def flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("format", [Mx(4), Mx(8), Fp8(), Nvfp4()], ids=lambda format: format.label)
def test_values_are_the_same_where_subnormal_numbers_are_flushed(codec: Any, format: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLS, generator=generator)
    weight *= 2.0 ** torch.randint(-16, 1, (ROWS, COLS), generator=generator)  # down to e4m3's own subnormals
    tensors, _ = codec.encode(format, weight.bfloat16())
    whole = Weight("w", "expert.gate", ROWS, COLS, format, ())
    values = codec.decode(format, tensors, ROWS, COLS)
    checked = quick_values(whole, tensors, ROWS, Buffers())
    with flushed():
        assert torch.equal(codec.decode(format, tensors, ROWS, COLS), values)
        assert torch.equal(quick_values(whole, tensors, ROWS, Buffers()), checked)
