#!/bin/sh
# Two rules for ties and three for negative zeros: the same value with the same scale gets other FP4 (E2M1) codes by the library.
#
# Versions: torch 2.13.0 (CPU), torchao 0.18.0, compressed-tensors 0.20.0, ml_dtypes 0.6.0, mlx 0.32.4 (CPU), gguf 0.19.0.
# Expected: with the scale given there is nothing left to choose: the nearest of eight magnitudes, the even code of two equally near.
# Seen: 0.75, 1.75 and 3.5 become 1, 2 and 4 (the even code) by ml_dtypes, torchao and compressed-tensors, but 0.5, 1.5 and 3 by
#   MLX and gguf, which take the smaller magnitude of every tie. -0.0 stays -0.0 (code 8) by ml_dtypes and torchao; it is 0.0 by the
#   others. -0.1 becomes -0.0 by ml_dtypes, torchao and compressed-tensors, 0.0 by MLX and gguf.
# So: BF16 weights hit ties often (0.5% of the values of groups of normal weights), so "bit for bit" needs a name beside it.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 compressed-tensors==0.20.0 ml_dtypes==0.6.0 gguf==0.19.0 \
    "mlx[cpu]==0.32.4" numpy==2.4.6
"$DIR/venv/bin/python" - 2>/dev/null <<'PYTHON'
import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import FP4_E2M1_DATA
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

MXFP4 = gguf.GGMLQuantizationType.MXFP4
FORM = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def by_ml_dtypes(values):
    return values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def by_torchao(values):
    return f4_unpacked_to_f32(f32_to_f4_unpacked(torch.tensor(values))).numpy()


def by_compressed_tensors(values):
    packed = pack_fp4_to_uint8(FP4_E2M1_DATA.cast_to_fp4(torch.tensor(values)))
    return unpack_fp4_from_uint8(packed, *values.shape).float().numpy()


def by_mlx(values):
    words, scales = mx.quantize(mx.array(values), **FORM)
    assert np.all(np.array(scales) == 127)  # 1: the largest of each group is 6
    return np.array(mx.dequantize(words, scales, **FORM).astype(mx.float32))


def by_gguf(values):
    blocks = gguf.quants.quantize(values, MXFP4)
    assert np.all(blocks.reshape(-1, 17)[:, 0] == 127)
    return gguf.quants.dequantize(blocks, MXFP4)


EVEN = (by_ml_dtypes, by_torchao, by_compressed_tensors)
DOWN = (by_mlx, by_gguf)
shown = np.array([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.75, -1.75, -3.5, -0.1, -0.0, *[0] * 19, 6]], np.float32)
ties, down = [0, 1, 1, 2, 2, 4, 4, -1, -2, -4], [0, 0.5, 1, 1.5, 2, 3, 4, -0.5, -1.5, -3]
for encode in EVEN + DOWN:
    values = encode(shown)[0]
    print(f"{encode.__name__:22}", *values[:12])
    assert values[:10].tolist() == (ties if encode in EVEN else down), "another rule for ties"
    assert np.signbit(values[10]) == (encode in EVEN), "another rule for negative values that become zero"
    assert np.signbit(values[11]) == (encode in EVEN[:2]), "another rule for negative zeros"

weights = torch.tensor(np.random.default_rng(0).standard_normal((4096, 32))).bfloat16().float().numpy()
weights *= np.float32(4) / 2 ** np.floor(np.log2(abs(weights).max(1, keepdims=True)))  # the largest in [4, 8)
weights = weights[abs(weights).max(1) <= 6]
even, less = by_ml_dtypes(weights), by_gguf(weights)
assert all(np.array_equal(encode(weights), even) for encode in EVEN), "they differ elsewhere too"
assert all(np.array_equal(encode(weights), less) for encode in DOWN), "they differ elsewhere too"
share = (even != less).mean()
print(f"values that differ: {share:.2%} of {weights.size:,}")
assert 0.003 < share < 0.007
PYTHON
