#!/bin/sh
# safetensors.numpy saves a transposed array as other numbers, without a word; the torch side of the package refuses it.
#
# Versions: safetensors 0.8.0, numpy 2.4.6, torch 2.13.0.
# Expected: the array that was given, or an error. The docstring asks for contiguous arrays; safetensors.torch raises ValueError for
#   others and says what to do.
# Seen: `weight.T`, np.asfortranarray(weight) and a slice of columns are written as the memory lies, under the shape of the view:
#   what is loaded has the right shape and dtype, and its numbers in other places; of a slice other numbers.
# So: converters that transpose with numpy (GPTQ to rows, Conv1D to Linear) need np.ascontiguousarray before save_file.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6 torch==2.13.0
"$DIR/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch
from safetensors.numpy import load, save
from safetensors.torch import save as save_torch

weight = np.arange(12, dtype=np.float32).reshape(3, 4)
views = {"transposed": weight.T, "in Fortran's order": np.asfortranarray(weight), "columns 1 and 2": weight[:, 1:3]}
for name, view in views.items():
    loaded = load(save({"weight": view}))["weight"]
    print(f"{name}: {view.tolist()} is loaded as {loaded.tolist()}")
    assert loaded.shape == view.shape and loaded.dtype == view.dtype
    assert not np.array_equal(loaded, view), "strides are taken into account now"
    safe = load(save({"weight": np.ascontiguousarray(view)}))["weight"]
    assert np.array_equal(safe, view)
try:
    save_torch({"weight": torch.tensor(weight).T})
except ValueError as error:
    print("safetensors.torch:", type(error).__name__, str(error).split(":")[0])
else:
    raise AssertionError("safetensors.torch takes it now")
PYTHON
