#!/bin/sh
# mlx-lm reads compressed-tensors' INT8 with the zero point of INT4: every weight is 120 scales too large, without a word.
#
# Versions: mlx-lm 0.32.2, mlx 0.32.4 (CPU), compressed-tensors 0.20.0, torch 2.13.0, transformers 5.23.0.
# Expected: "pack-quantized" keeps codes from 0 to 2^bits - 1 about a zero point of 2^(bits - 1): 8 for INT4, 128 for INT8. A
#   DeepSeek-V3 or Kimi-K2 in that form loads with compressed-tensors' values or is refused.
# Seen for a layer of 4 bits: its values, rounded to BF16. For the same layer in 8 bits: loaded as 8 bits and groups of 32, as the
#   shapes say, but each value is (q - 8) * scale in place of (q - 128) * scale: 98% of them positive. The model answers.
# So: mlx-lm's own loading is for INT4 experts only; convert W8A16 to MLX's layout with biases of -128 * scale.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.20.0 transformers==5.23.0 mlx-lm==0.32.2 "mlx[cpu]==0.32.4"
"$DIR/venv/bin/python" - "$DIR" <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3
from mlx_lm.utils import load_model
from safetensors.torch import save_file

LAYER, GROUP = "model.layers.0.mlp.down_proj", 32
ranks = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 4}
config = {"model_type": "deepseek_v3"} | ranks | sizes | heads
model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))
others = {name: torch.tensor(np.array(value)) for name, value in tree_flatten(model.parameters())}
others = {name: value.bfloat16() for name, value in others.items() if not name.startswith(LAYER)}
weight = torch.tensor(np.random.default_rng(0).standard_normal((64, 128))).bfloat16() * 0.02


def load(bits):
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    groups = weight.unflatten(1, (-1, GROUP))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    parts = PackedQuantizationCompressor.compress(parts, scheme)
    parts = {name: value for name, value in parts.items() if value is not None}
    right = PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"].float().numpy()
    assert np.linalg.norm(right - weight.float().numpy()) < 0.2 * np.linalg.norm(right), "this script packs wrong"
    root = Path(sys.argv[1]) / f"int{bits}"
    root.mkdir()
    save_file(others | {f"{LAYER}.{name}": value for name, value in parts.items()}, root / "model.safetensors")
    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    declared["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
    (root / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    loaded, _ = load_model(root)
    layer = loaded.model.layers[0].mlp.down_proj
    assert (layer.bits, layer.group_size) == (bits, GROUP)
    form = {"group_size": GROUP, "bits": bits}
    values = mx.dequantize(layer.weight, layer.scales, layer.biases, **form).astype(mx.float32)
    answer = loaded(mx.array([[1, 2, 3]]))
    assert np.isfinite(np.array(answer.astype(mx.float32))).all()
    return np.array(values), right, scale.float().repeat_interleave(GROUP, 1).numpy()


values, right, scale = load(4)
print(f"INT4: off by {abs(values - right).max() / scale.max():.2f} scales at most")
assert abs(values - right).max() < 0.05 * scale.max()
values, right, scale = load(8)
off = (values - right) / scale
print(f"INT8: off by {off.min():.1f} to {off.max():.1f} scales", end="; ")
print(f"{(right > 0).mean():.1%} of the weights are positive, as loaded {(values > 0).mean():.1%}")
assert abs(off - 120).max() < 3, "the zero point is 128 now"
PYTHON
