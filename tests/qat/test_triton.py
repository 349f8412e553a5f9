"""The kernels of Triton, by its interpreter on the CPU: the bits of the CPU's kernels. Skipped where Triton is not installed.

The interpreter cuts what it converts to bf16 and rounds a fused multiply-add twice, which no device does; both are mended here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kconvert_qat.grids.table import GRIDS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CHILD = """
import sys
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

KINDS = {tl.float32: (torch.float32, torch.int32, "u4"), tl.bfloat16: (torch.bfloat16, torch.int16, "u2")}

def convert(data, source, target, rounding):
    (dtype, _, bits), (wanted, integers, unsigned) = KINDS[source], KINDS[target]
    values = torch.from_numpy(np.ascontiguousarray(data).view(bits.replace("u", "i"))).view(dtype)
    return values.to(wanted).view(integers).numpy().view(unsigned).reshape(data.shape)

def fma(self, x, y, z):
    found = x.data.astype("f8") * y.data.astype("f8") + z.data.astype("f8")
    return interpreter.TensorHandle(found.astype("f4"), z.dtype.scalar)

interpreter._convert_float = convert
interpreter.InterpreterBuilder.create_fma = fma

from kconvert_qat.grid import fake_quantise
from kconvert_qat.grids import cuda_floats
from tests.qat.test_cuda import KINDS as WEIGHTS, SPELT, bits, grid_weights

for grid, convention, size in SPELT:
    for kind in WEIGHTS if grid == sys.argv[1] else ():
        for dtype in (torch.bfloat16, torch.float32):
            weight, mate = grid_weights(kind, grid, dtype)
            served = torch.empty_like(weight)
            cuda_floats.fake_quantise(weight, size, convention, grid, mate, served)
            wanted = fake_quantise(weight, size, convention, False, grid, mate)
            assert torch.equal(bits(served), bits(wanted)), (convention, size, kind, dtype)
"""


@pytest.mark.parametrize("grid", list(GRIDS))
def test_the_interpreted_kernel_makes_the_bits_of_the_cpus(grid):
    paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, grid]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
