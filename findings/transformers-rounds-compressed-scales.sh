#!/bin/sh
# The F32 scales of a compressed-tensors FP8 model are BF16 once transformers has loaded it: rows are off by up to 0.4%.
#
# Versions: transformers 5.23.0, compressed-tensors 0.20.0, accelerate 1.15.0, torch 2.13.0, on a CPU.
# Expected: dtype=torch.bfloat16 is for the model's weights; the codes stay FP8, the scales what the file has, in F32.
# Seen: the codes stay, `weight_scale` is BF16: 54 of a layer's 64 scales are rounded, by up to 0.33%, each row of the weight as a whole
#   by as much, which no sum averages out. The load report is clean. With CompressedTensorsConfig(dequantize=True) the scales are
#   multiplied in F32: the same file, loaded the other way, has the product of code and scale, rounded once.
# So: logits of the compressed model are not those of the checkpoint; dequantise before comparing a conversion with it.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0 accelerate==1.15.0
"$DIR/venv/bin/python" - "$DIR/model" 2>"$DIR/log" <<'PYTHON' || { cat "$DIR/log"; exit 1; }
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3Config

FORMAT, NAME = "float-quantized", "model.layers.0.mlp.down_proj"
root = Path(sys.argv[1])
torch.manual_seed(0)
sizes = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "head_dim": 64}
config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=4)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root)
tensors = load_file(root / "model.safetensors")
for name in [name for name in tensors if name.endswith("_proj.weight")]:
    weight = tensors[name].float()
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
save_file(tensors, root / "model.safetensors", {"format": "pt"})
weights = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).weights.model_dump(mode="json")
declared = json.loads((root / "config.json").read_text())
declared["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": FORMAT,
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "format": FORMAT, "weights": weights}},
    "ignore": ["lm_head"],
}
(root / "config.json").write_text(json.dumps(declared))


def load(**options):
    model, report = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not any(report.values()), "the load report has something to say now"
    return model.get_submodule(NAME)


codes, scale = tensors[f"{NAME}.weight"], tensors[f"{NAME}.weight_scale"]
assert scale.dtype == torch.float32
layer = load()
assert torch.equal(layer.weight.float(), codes.float())
off = (layer.weight_scale.float() / scale - 1).abs().flatten()
different, dtype = (off > 0).sum(), layer.weight_scale.dtype
print(f"compressed: the scales are {dtype}, {different} of {len(off)} differ, by up to {off.max():.2%}")
assert dtype == torch.bfloat16 and different > 50 and off.max() > 2**-9, "the scales stay F32 now"
weight = load(quantization_config=CompressedTensorsConfig(dequantize=True)).weight
right = torch.equal(weight, (codes.float() * scale).bfloat16())
print(f"dequantised on loading: {weight.dtype}, equal to code * scale rounded once: {right}")
assert right, "dequantising rounds otherwise now"
PYTHON
