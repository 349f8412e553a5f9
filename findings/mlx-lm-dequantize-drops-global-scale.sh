#!/bin/sh
# mlx-lm's NVFP4 experts with a global scale come out of `dequantize` without it: tens of thousands of times too large.
#
# Versions: mlx-lm 0.32.2, mlx 0.32.4 with its CPU backend, numpy 2.4.6.
# Expected: `mlx_lm.convert --dequantize` and `mlx_lm.fuse --dequantize` give the weights back that the layer computes with.
# Seen: quantize_model(mode="nvfp4", global_scale=True) gives each expert a scale of its own, in the parameter `global_scale`.
#   dequantize_model does not pass it on: experts of 0.02 are 30,000 to 37,000 times too large, each by another factor, 2688 / its largest
#   magnitude. No error, no warning. With `global_scale` mx.dequantize gives them back with the error of the format.
# So: an NVFP4 MLX model that has `global_scale` in it must not be dequantised by mlx-lm, nor LoRA adapters be fused that way.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet mlx-lm==0.32.2 "mlx[cpu]==0.32.4" numpy==2.4.6
"$DIR/venv/bin/python" - 2>/dev/null <<'PYTHON'
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import dequantize_model, quantize_model

FORM = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
EXPERTS = 4


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = SwitchLinear(64, 128, EXPERTS, bias=False)


def norms(weights):
    return np.linalg.norm(np.array(weights.astype(mx.float32)), axis=(1, 2))


model = Experts()
weights = mx.array((np.random.default_rng(0).standard_normal((EXPERTS, 128, 64)) * 0.02).astype("f4"))
model.down_proj.weight = weights
model, _ = quantize_model(model, {}, 16, 4, mode="nvfp4", global_scale=True)
layer = model.down_proj
wholes = layer.global_scale
parts = [mx.dequantize(layer.weight[e], layer.scales[e], global_scale=wholes[e], **FORM) for e in range(EXPERTS)]
right = mx.stack(parts).astype(mx.float32)
error = norms(right - weights) / norms(weights)
print("with the global scale: error", *(f"{each:.1%}" for each in error))
assert (error < 0.11).all(), "this script dequantises wrong"
values = dequantize_model(model).down_proj.weight
times = norms(values) / norms(right)
print("dequantize_model: too large by", *(f"{each:,.0f}" for each in times), "times")
assert np.allclose(times, 448 * 6 / np.array(wholes), rtol=0.01), "the global scale is taken into account now"
PYTHON
