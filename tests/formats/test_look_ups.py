"""Four-bit codes have the same values on processors that look sixteen of them up at once and on those that do not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Compiled by numba where it runs, as NUMBA_CPU_NAME has it.
SCRIPT = """
import numba
import numpy as np

from kconvert.native import base

if numba.config.CPU_NAME:
    base.features = lambda: ""

from kconvert.formats.gptq import Gptq
from kconvert.formats.kernels import PACKAGE
from kconvert.formats.packed import Packed

PACKAGE.__dict__["folder"] = None
numbers = np.random.default_rng(0)
codes = numbers.integers(0, 256, 40 * 96 // 2, np.uint8)
zeros = numbers.integers(0, 256, 40 * 3 // 2, np.uint8)
scale = numbers.random(40 * 3, np.float32)
by_row = codes, (scale.view("u4") >> 16).astype("u2").view("u1")
across = codes, zeros, scale.astype("f2").view("u1")
for dtype in ("u2", "f4"):
    for format, parts in ((Packed(32), by_row), (Gptq(32), across)):
        tile = np.zeros((40, 96), dtype)
        format.decode(parts, 0, tile)
        print(tile.tobytes().hex())
"""


def decoded(**settings: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **settings}, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Haswell is an x86")
def test_a_processor_without_avx512_compiles_them_too() -> None:
    values = decoded()
    assert len(set(values.split())) == 4
    assert decoded(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="") == values
