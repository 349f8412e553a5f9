#!/bin/sh
# MLX's 4-bit affine weights with BF16 scales are not (q - 8) * s: the product and the sum are each rounded to BF16.
#
# Versions: mlx 0.32.4 with its CPU backend, numpy 2.4.6.
# Expected: symmetric INT4 has a spelling in MLX that loses nothing: the same codes, scales s and biases -8 * s, all of them exact
#   in BF16, so a weight should be (q - 8) * s rounded once.
# Seen: over all codes and all mantissas of a BF16 scale 39% of the values are another BF16 number, by up to 3.4%, as
#   q * s is rounded where it is large and 8 * s then taken from it. quantized_matmul computes with the same values. With the
#   same scales and biases in F32 every value is exact, at 6 bits a weight in place of 5.
# So: codes and scales that are the source's bit for bit do not prove a weight's value; which dtype the scales have decides it.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" numpy==2.4.6
"$DIR/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np

FORM = {"group_size": 32, "bits": 4}
CODES = np.tile(np.arange(16, dtype="f4"), 2)
words = mx.array(np.tile(np.array([0x76543210, 0xFEDCBA98] * 2, np.uint32), (128, 1)))
scales = (np.arange(128, dtype=np.uint32) + (121 << 7) << 16).view("f4")[:, None]  # 2^-6 to 2^-5: every BF16 there is
exact = (CODES - 8) * scales  # at most 4 bits times 8: exact in F32
bits = exact.view("u4")
once = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view("f4")  # half to even


def values(dtype):
    s = mx.array(scales).astype(dtype)
    b = mx.array(-8 * scales).astype(dtype)
    identity = mx.array(np.eye(32, dtype="f4")).astype(dtype)
    product = mx.quantized_matmul(identity, words, s, b, transpose=True, **FORM)
    weight = mx.dequantize(words, s, b, **FORM)
    return np.array(weight.astype(mx.float32)), np.array(product.astype(mx.float32)).T


weight, product = values(mx.bfloat16)
different = (weight != once).mean()
worst = (abs(weight - once)[:, CODES != 8] / abs(once)[:, CODES != 8]).max()
print(f"BF16 scales: {different:.1%} of the values are not (q - 8) * s rounded once, by up to {worst:.1%}")
assert 0.38 < different < 0.39 and 0.034 < worst < 0.035, "MLX rounds otherwise now"
assert np.array_equal(product, weight), "quantized_matmul computes with other values than dequantize gives"
weight, product = values(mx.float32)
assert np.array_equal(weight, exact) and np.array_equal(product, exact), "F32 scales are no longer exact"
print("F32 scales: every value is (q - 8) * s")
PYTHON
