#!/bin/sh
# One NaN in a group of weights is no NaN after MXFP4: the whole group becomes 0, without a word.
#
# Versions: gguf 0.19.0, mlx 0.32.4 (CPU), torch 2.13.0, compressed-tensors 0.20.0, torchao 0.18.0.
# Expected: an error, or NaN in what is read back, as a group with a NaN has no scale.
# Seen for 256 normal weights, the sixth of which is NaN: gguf, MLX and compressed-tensors write MXFP4 in which the 32 weights of that
#   group are 0; torchao writes the scale that is NaN. MLX's NVFP4 has 16 zeros. Its MXFP8 turns the 32 into +-896. Its affine
#   4 bits make of the NaN the group's largest or smallest weight and keep the rest. But for torchao's none has a NaN left.
# So: look for NaN before quantising; looking at the result is too late, and a dead or saturated group is what remains.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 compressed-tensors==0.20.0 gguf==0.19.0 "mlx[cpu]==0.32.4" \
    numpy==2.4.6
"$DIR/venv/bin/python" -W ignore - 2>"$DIR/log" <<'PYTHON' || { cat "$DIR/log"; exit 1; }
import gguf
import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors import MXFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torchao.prototype.mx_formats.mx_tensor import MXTensor

MXFP4 = gguf.GGMLQuantizationType.MXFP4
SCHEME = preset_name_to_scheme("MXFP4A16", ["Linear"])


def by_gguf(weights):
    return gguf.quants.dequantize(gguf.quants.quantize(weights, MXFP4), MXFP4)


def by_compressed_tensors(weights):
    weights = torch.tensor(weights).bfloat16()
    groups = weights.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEME.weights)
    parts = {"weight": weights, "weight_scale": scale, "weight_zero_point": zero}
    parts = MXFP4PackedCompressor.compress(parts, SCHEME)
    return MXFP4PackedCompressor.decompress(dict(parts), SCHEME)["weight"].float().numpy()


def by_torchao(weights):
    tensor = MXTensor.to_mx(torch.tensor(weights).bfloat16(), torch.float4_e2m1fn_x2, 32)
    return tensor.dequantize(torch.float32).numpy()


def by_mlx(mode, group, bits):
    def encode(weights):
        form = {"group_size": group, "bits": bits, "mode": mode}
        return np.array(mx.dequantize(*mx.quantize(mx.array(weights), **form), **form).astype(mx.float32))

    return encode


weights = np.random.default_rng(0).standard_normal((1, 256)).astype("f4")
weights[0, 5] = np.nan
ways = {"gguf MXFP4": by_gguf, "compressed-tensors MXFP4": by_compressed_tensors, "torchao MXFP4": by_torchao}
for mode, group, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8), ("affine", 32, 4)):
    ways[f"mlx {mode}"] = by_mlx(mode, group, bits)
seen = {}
for name, encode in ways.items():
    group = 16 if name.endswith("nvfp4") else 32
    values = encode(weights)[0]
    assert np.linalg.norm(values[group:] - weights[0, group:]) < 0.2 * np.linalg.norm(weights[0, group:])
    first = values[:group]
    nans, least, most = int(np.isnan(first).sum()), np.abs(first).min(), np.abs(first).max()
    seen[name] = (nans, str(least), str(most))
    print(f"{name:25} {nans} NaN, magnitudes from {least} to {most}; the NaN is {first[5]}")
zeros = (0, "0.0", "0.0")
assert seen.pop("torchao MXFP4") == (32, "nan", "nan")
assert seen.pop("mlx mxfp8") == (0, "896.0", "896.0")
assert seen.pop("mlx affine")[0] == 0
assert all(each == zeros for each in seen.values()), "somebody keeps the NaN now"
PYTHON
