#!/bin/sh
# The experts of a compressed-tensors NVFP4 checkpoint are loaded without their global scale: thousands of times too large.
#
# Versions: transformers 5.23.0, compressed-tensors 0.20.0, accelerate 1.15.0, torch 2.13.0, on a CPU.
# Expected: the values of compressed-tensors' own `decompress`, code * (scale / global scale), or an error.
# Seen: the experts, which transformers fuses into one parameter while loading, have the values code * scale. The load report
#   is clean and the model answers.
# So: transformers is no judge of NVFP4 experts; convert them to BF16 before loading.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0 accelerate==1.15.0
"$DIR/venv/bin/python" - "$DIR/model" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

FORMAT, GROUP, EXPERTS = "nvfp4-pack-quantized", 16, 4
root = Path(sys.argv[1])
torch.manual_seed(0)
attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
sizes = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256}
config = Qwen3MoeConfig(**sizes, **attention, **experts)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root)

scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
tensors = load_file(root / "model.safetensors")
right = {}
for name in [name for name in tensors if ".experts." in name]:
    weight = tensors.pop(name)
    global_scale = 448 * 6 / weight.float().abs().max().reshape(1)
    amax = weight.float().unflatten(1, (-1, GROUP)).abs().amax(-1)
    scale = (amax / 6 * global_scale).to(torch.float8_e4m3fn).to(torch.bfloat16)
    parts = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    parts = NVFP4PackedCompressor.compress(parts, scheme)
    right[name] = NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
    assert (right[name] - weight).norm() < 0.2 * weight.norm(), "this script does not quantise as it should"
    tensors |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
save_file(tensors, root / "model.safetensors", {"format": "pt"})
group = {"targets": ["Linear"], "format": FORMAT, "weights": scheme.weights.model_dump(mode="json")}
declared = json.loads((root / "config.json").read_text())
declared["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": FORMAT,
    "quantization_status": "compressed",
    "config_groups": {"group_0": group},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
}
(root / "config.json").write_text(json.dumps(declared))

model, report = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16, output_loading_info=True)
loaded = model.model.layers[0].mlp.experts.down_proj
wanted = torch.stack([right[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] for expert in range(EXPERTS)])
ratio = (loaded.float().norm() / wanted.float().norm()).item()
print(f"load report: {({key: list(found) for key, found in report.items() if found}) or 'clean'}")
print(f"largest value of down_proj: {wanted.abs().max():.4f} by compressed-tensors, {loaded.abs().max():.0f} loaded")
print(f"on the whole {ratio:,.0f} times too large; the global scale is {global_scale.item():,.0f}")
assert not any(report.values()), "the load report has something to say now"
assert ratio > 1000, "the global scale is taken into account now"
PYTHON
