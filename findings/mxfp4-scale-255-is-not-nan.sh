#!/bin/sh
# One MXFP4 block whose scale byte is 255 is read in three ways by five libraries, two of which have no NaN in it.
#
# Versions: gguf 0.19.0, mlx 0.32.4 (CPU), transformers 5.23.0, torch 2.13.0, compressed-tensors 0.20.0.
# Expected: by the OCP microscaling standard E8M0's 255 is NaN, so each of the block's 32 values is NaN.
# Seen for the codes 0.5, 1 and 0: torch's float8_e8m0fnu says NaN for each. compressed-tensors and MLX say inf, inf and NaN (0 times
#   infinity). transformers and gguf's numpy reader say 1.7e38, inf and 0: no NaN at all, and one value that is finite.
# So: a damaged scale may pass every check for NaN after decoding. It has to be refused where the scale is still a byte.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.20.0 transformers==5.23.0 gguf==0.19.0 "mlx[cpu]==0.32.4"
"$DIR/venv/bin/python" - <<'PYTHON'
import gguf
import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors import MXFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

NAN = 255
CODES = (1, 2, 0)  # 0.5, 1 and 0
nibbles = np.array([*CODES, *[0] * 29], np.uint8)
pairs = nibbles[0::2] | nibbles[1::2] << 4  # as everybody but GGUF has them
halves = nibbles[:16] | nibbles[16:] << 4


def by_torch():
    scale = torch.tensor([NAN], dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    return torch.tensor([0.5, 1, 0]) * scale


def by_compressed_tensors():
    tensors = {"weight_packed": torch.tensor(pairs[None]), "weight_scale": torch.tensor([[NAN]], dtype=torch.uint8)}
    return MXFP4PackedCompressor.decompress(tensors, preset_name_to_scheme("MXFP4A16", ["Linear"]))["weight"][0]


def by_transformers():
    scales = torch.tensor([[[NAN]]], dtype=torch.uint8)
    return convert_moe_packed_tensors(torch.tensor(pairs[None, None, None]), scales).flatten()


def by_mlx():
    form = {"group_size": 32, "bits": 4, "mode": "mxfp4", "dtype": mx.float32}
    return np.array(mx.dequantize(mx.array(pairs.view("u4")[None]), mx.array(np.array([[NAN]], np.uint8)), **form))[0]


def by_gguf():
    with np.errstate(over="ignore"):
        return gguf.quants.dequantize(np.array([[NAN, *halves]], np.uint8), gguf.GGMLQuantizationType.MXFP4)[0]


seen = {}
for read in (by_torch, by_compressed_tensors, by_transformers, by_mlx, by_gguf):
    values = [float(f"{float(value):.1e}") for value in read()[:3]]
    seen[read.__name__] = str(values)
    print(read.__name__, values)
infinite, finite = "[inf, inf, nan]", "[1.7e+38, inf, 0.0]"
assert seen == {
    "by_torch": "[nan, nan, nan]",
    "by_compressed_tensors": infinite,
    "by_transformers": finite,
    "by_mlx": infinite,
    "by_gguf": finite,
}, "somebody reads the byte otherwise now"
PYTHON
