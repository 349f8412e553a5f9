#!/bin/sh
# MLX makes infinity of a group of very small weights in MXFP4 and MXFP8: the scale's exponent wraps around below 2^-127.
#
# Versions: mlx 0.32.4 with its CPU backend, gguf 0.19.0, torch 2.13.0, torchao 0.18.0, numpy 2.4.6.
# Expected: 0, or a value as small: 2^-127 is the smallest scale that E8M0 has, and a smaller one is rounded to it.
# Seen: 32 weights of 2^-120 get the scale byte 255 in MXFP8, and those of 2^-126 in MXFP4: both are infinite when read. Weights of
#   1e-39 get byte 251 in MXFP4 and are read as 1.3e38. gguf and torchao give 0 or a value as small.
# So: rows that training has let decay (BF16 goes down to 9e-41) turn a converted layer into infinities. Set what is below 2^-118 to 0
#   before mx.quantize, or look for infinity after it.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" gguf==0.19.0 torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$DIR/venv/bin/python" -W ignore - 2>"$DIR/log" <<'PYTHON' || { cat "$DIR/log"; exit 1; }
import gguf
import mlx.core as mx
import numpy as np
import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor

GGUF = gguf.GGMLQuantizationType.MXFP4
BITS = {"mxfp4": 4, "mxfp8": 8}


def by_mlx(weights, mode):
    form = {"group_size": 32, "bits": BITS[mode], "mode": mode, "dtype": mx.float32}
    words, scales = mx.quantize(mx.array(weights), **{key: form[key] for key in ("group_size", "bits", "mode")})
    return scales[0, 0].item(), mx.dequantize(words, scales, **form)[0, 0].item()


def by_torchao(weights, mode):
    dtype = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn}[mode]
    return MXTensor.to_mx(torch.tensor(weights), dtype, 32).dequantize(torch.float32)[0, 0].item()


for mode, value, byte, read in (
    ("mxfp4", 2.0**-125, 0, 2.0**-125),
    ("mxfp4", 2.0**-126, 255, np.inf),
    ("mxfp4", 1e-39, 251, 1.28e38),
    ("mxfp8", 2.0**-116, 3, 2.0**-116),
    ("mxfp8", 2.0**-120, 255, np.inf),
):
    weights = np.full((1, 32), value, np.float32)
    scale, seen = by_mlx(weights, mode)
    print(f"{mode} of {value:.2g}: MLX's scale byte is {scale}, the value {seen:.2g}", end="; ")
    assert scale == byte and (seen == read or abs(seen / read - 1) < 0.01), "MLX does otherwise now"
    others = [by_torchao(weights, mode)]
    if mode == "mxfp4":
        others.append(gguf.quants.dequantize(gguf.quants.quantize(weights, GGUF), GGUF)[0, 0])
    print("others:", *(f"{other:.2g}" for other in others))
    assert all(0 <= other <= 1.5 * value for other in others)
PYTHON
