#!/bin/sh
# Block scales in F8_E8M0 are read by MLX as the integers of their bytes, and multiplied by mlx-lm as such: 100,000 times too large.
#
# Versions: mlx 0.32.4 (CPU), mlx-lm 0.32.2, torch 2.13.0, safetensors 0.8.0, transformers 5.23.0.
# Expected: weight * scale, as with the same powers of two in F32 or BF16, or an error; F8_E5M2 and F4 are refused by mx.load.
# Seen: mx.load gives uint8 for a tensor of F8_E8M0. DeepSeek-V3's loader in mlx-lm multiplies FP8 blocks by what it gets: 117 in place
#   of 2^-10. No error; dtype and shapes are right.
# So: write block scales for mlx-lm as F32, whatever the engine at the other end prefers.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2 torch==2.13.0 safetensors==0.8.0 transformers==5.23.0
"$DIR/venv/bin/python" - "$DIR/model.safetensors" 2>"$DIR/log" <<'PYTHON' || { cat "$DIR/log"; exit 1; }
import sys

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models import deepseek_v3
from safetensors.torch import save_file

PATH, NAME = sys.argv[1], "model.layers.0.mlp.down_proj.weight"
ranks = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
model = deepseek_v3.Model(deepseek_v3.ModelArgs(first_k_dense_replace=1, n_routed_experts=4, **ranks, **sizes))
weight = (100 * torch.tensor(np.random.default_rng(0).standard_normal((256, 256)))).to(torch.float8_e4m3fn)
scales = torch.tensor([[2.0**-10, 2.0**-11], [2.0**-12, 2.0**-9]])
right = (weight.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)).numpy()


def read(dtype):
    save_file({NAME: weight, f"{NAME}_scale_inv": scales.to(dtype)}, PATH)
    tensors = mx.load(PATH)
    loaded = tensors[f"{NAME}_scale_inv"]
    values = model.sanitize(tensors)[NAME]
    assert values.dtype == mx.bfloat16 and values.shape == weight.shape
    return loaded, np.array(values.astype(mx.float32))


for dtype in (torch.float32, torch.bfloat16):
    loaded, values = read(dtype)
    print(f"scales in {dtype}: loaded as {loaded.dtype}, values equal: {np.array_equal(values, right)}")
    assert np.array_equal(values, right)
loaded, values = read(torch.float8_e8m0fnu)
times = np.linalg.norm(values) / np.linalg.norm(right)
read_as = loaded.flatten().tolist()
print(f"scales in torch.float8_e8m0fnu: loaded as {loaded.dtype} {read_as}, values {times:,.0f} times too large")
assert loaded.dtype == mx.uint8 and read_as == [117, 116, 115, 118] and times > 10_000, "E8M0 is read now"
for dtype in (torch.float8_e5m2, torch.float4_e2m1fn_x2):
    save_file({"codes": torch.zeros(4, 8, dtype=torch.uint8).view(dtype)}, PATH)
    try:
        mx.load(PATH)
    except RuntimeError as error:
        print(f"{dtype}: {error}")
    else:
        raise AssertionError(f"{dtype} is loaded now")
PYTHON
