#!/bin/sh
# A weight of zeros is NaN after torchao's NVFP4: the model answers with NaN, and nothing says so.
#
# Versions: torchao 0.18.0, torch 2.13.0, on a CPU; compressed-tensors 0.20.0 and mlx 0.32.4 beside it.
# Expected: zeros. They are in real checkpoints: experts that were never chosen or were pruned, padded rows, new LoRA matrices.
# Seen: quantize_ with NVFP4WeightOnlyConfig() takes max / 2688 for the tensor's scale, which is 0, and divides by it: each of the
#   values is NaN, and so is the layer's answer. Zeros beside other weights are zeros. compressed-tensors and MLX (with global_scale)
#   keep zeros.
# So: leave weights whose largest magnitude is 0 out of the filter of quantize_.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 compressed-tensors==0.20.0 transformers==5.23.0 "mlx[cpu]==0.32.4"
"$DIR/venv/bin/python" -W ignore - 2>"$DIR/log" <<'PYTHON' || { cat "$DIR/log"; exit 1; }
import mlx.core as mx
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import quantize_

zeros = torch.zeros(64, 256, dtype=torch.bfloat16)
half = zeros.clone()
half[:32] = torch.randn(32, 256)
nans = {}
for name, weight in (("all", zeros), ("half", half)):
    layer = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(weight.clone())
    quantize_(layer, NVFP4WeightOnlyConfig())
    read = layer.weight.dequantize(torch.float32)
    answer = layer(torch.ones(1, 256, dtype=torch.bfloat16))
    nans[name] = read.isnan().float().mean().item(), answer.isnan().float().mean().item()
    print(f"torchao, {name} of the weight zero: {nans[name][0]:.0%} of it is NaN, {nans[name][1]:.0%} of the answer")
assert nans == {"all": (1, 1), "half": (0, 0)}, "torchao keeps zeros now"

scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
groups = zeros.unflatten(1, (-1, 16))
whole = generate_gparam(zeros.amin().reshape(1), zeros.amax().reshape(1))
scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=whole)
parts = {"weight": zeros, "weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": whole}
parts = NVFP4PackedCompressor.compress(parts, scheme)
read = NVFP4PackedCompressor.decompress(dict(parts), scheme)["weight"]
print(f"compressed-tensors: largest magnitude {read.abs().max()}")
assert (read == 0).all()
form = {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": mx.array(0.0)}
read = mx.dequantize(*mx.quantize(mx.zeros((64, 256)), **form), **form)
print(f"mlx: largest magnitude {mx.abs(read).max().item()}")
assert (read == 0).all().item()
PYTHON
