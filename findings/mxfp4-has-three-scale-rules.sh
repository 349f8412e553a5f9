#!/bin/sh
# "MXFP4" made of the same BF16 weights is other bytes by every library: there are three rules for a group's scale.
#
# Versions: gguf 0.19.0, mlx 0.32.4 (CPU), torch 2.13.0, compressed-tensors 0.20.0.
# Expected: the format is a standard, so that "the MXFP4 of this model" is one thing, whoever made it.
# Seen for groups of 32 normal weights: with a group's largest magnitude in [1, 2) times a power of two p, gguf takes p / 4 always
#   (from 1.5 on the largest values are clipped), compressed-tensors p / 2 from 1.75 on, and MLX p / 2 above 1.5 (nothing is
#   clipped). gguf and MLX disagree about the scale of 29% of the groups, gguf and compressed-tensors about 16%.
#   Values that are MXFP4 already come back from all three.
# So: training against one of the grids and exporting by another rule moves weights. A reader of MXFP4 cannot know the rule.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.20.0 gguf==0.19.0 "mlx[cpu]==0.32.4"
"$DIR/venv/bin/python" - <<'PYTHON'
import gguf
import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors import MXFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams

GROUPS = 4096
TYPE = gguf.GGMLQuantizationType.MXFP4
SCHEME = preset_name_to_scheme("MXFP4A16", ["Linear"])


def by_gguf(weights):
    blocks = gguf.quants.quantize(weights, TYPE)
    return blocks.reshape(GROUPS, 17)[:, 0], gguf.quants.dequantize(blocks, TYPE)


def by_mlx(weights):
    form = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    words, scales = mx.quantize(mx.array(weights), **form)
    return np.array(scales)[:, 0], np.array(mx.dequantize(words, scales, **form).astype(mx.float32))


def by_compressed_tensors(weights):
    groups = torch.tensor(weights)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = calculate_qparams(low, high, SCHEME.weights)
    packed = MXFP4PackedCompressor.compress({"weight": groups, "weight_scale": scale, "weight_zero_point": zero}, SCHEME)
    values = MXFP4PackedCompressor.decompress(dict(packed), SCHEME)["weight"]
    return packed["weight_scale"].numpy()[:, 0], values.float().numpy()


LIBRARIES = {"gguf": by_gguf, "compressed-tensors": by_compressed_tensors, "mlx": by_mlx}
LOWEST = {"gguf": 2.0, "compressed-tensors": 1.75, "mlx": np.nextafter(1.5, 2)}  # that has the next power of two for a scale

weights = np.random.default_rng(0).standard_normal((GROUPS, 32)).astype("f4")
weights = torch.tensor(weights).bfloat16().float().numpy()
largest = abs(weights).max(1)
power = np.floor(np.log2(largest))
mantissa = largest / 2**power
scales = {}
for name, encode in LIBRARIES.items():
    scales[name], values = encode(weights)
    larger = scales[name] - (power - 2 + 127)
    assert np.array_equal(larger, mantissa >= LOWEST[name]), f"{name} has another rule now"
    error = np.linalg.norm(values - weights) / np.linalg.norm(weights)
    print(f"{name}: the larger scale from {LOWEST[name]:.2f} on, {larger.mean():.1%} of the groups, error {error:.2%}")
    again, same = encode(values)
    assert np.array_equal(same, values), f"{name} no longer keeps what it has made"
for one, other, share in (("gguf", "mlx", 0.29), ("gguf", "compressed-tensors", 0.16)):
    different = (scales[one] != scales[other]).mean()
    print(f"{one} and {other} disagree about {different:.1%} of the scales")
    assert abs(different - share) < 0.02
PYTHON
