#!/bin/sh
# What transformers has dequantised on loading it cannot save: the new checkpoint is loaded with other weights.
#
# Versions: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, on a CPU (where FP8 and MXFP4 are dequantised on loading).
# Expected: from_pretrained with `dequantize=True`, then save_pretrained, make a BF16 checkpoint, which is what the option is for.
# Seen: a gpt-oss has the right values in memory and in the file, but its experts have the names of the packed form there
#   (`down_proj_blocks` with BF16 in it, no scales): loading that makes new experts at random. A Qwen3 in FP8 is made FP8 again
#   while saving, its embedding and lm_head too, and config.json declares no quantisation: the codes are loaded as weights,
#   thousands of times too large. Both models answer; the load report names the keys and nothing raises. A Qwen3 mixture of
#   experts in FP8 is not saved: ValueError.
# So: transformers is no way from a quantised checkpoint to a BF16 one; look at dtypes and names before trusting such a file.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
"$DIR/venv/bin/python" - "$DIR" 2>"$DIR/log" <<'PYTHON' || { cat "$DIR/log"; exit 1; }
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Mxfp4Config, Qwen3Config, Qwen3MoeConfig

root = Path(sys.argv[1])
torch.manual_seed(0)
sizes = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "head_dim": 64}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}


def save_as(folder, config, change):
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    declared = json.loads((folder / "config.json").read_text())
    declared["quantization_config"] = change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(declared))


def in_mxfp4(tensors):
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, (experts, outer, inner // 32), dtype=torch.uint8)
    others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": others}


def in_fp8(tensors):
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 64), -(-columns // 64))
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}


def save_dequantised(source, target, how):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=how)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(target)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    again, report = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16, output_loading_info=True)
    print("load report:", {key: len(found) for key, found in report.items() if found})
    layers = model.model.layers[0].mlp, again.model.layers[0].mlp
    return *layers, load_file(target / "model.safetensors"), report


experts = {"num_experts_per_tok": 2}
save_as(root / "gpt-oss", GptOssConfig(**sizes, **heads, **experts, num_local_experts=4), in_mxfp4)
right, values, tensors, report = save_dequantised(root / "gpt-oss", root / "gpt-oss-saved", Mxfp4Config(dequantize=True))
right, values = right.experts.down_proj, values.experts.down_proj
stored = tensors["model.layers.0.mlp.experts.down_proj_blocks"]
off = ((values.float() - right.float()).norm() / right.float().norm()).item()
print(f"gpt-oss: down_proj is stored as down_proj_blocks in {stored.dtype}; loaded, it is off by {off:.0%}")
assert torch.equal(stored, right) and len(report["missing_keys"]) == 2 and off > 0.9, "it is loaded now"

how = FineGrainedFP8Config(dequantize=True, weight_block_size=(64, 64))
save_as(root / "dense", Qwen3Config(**sizes, **heads), in_fp8)
right, values, tensors, report = save_dequantised(root / "dense", root / "dense-saved", how)
stored = {tensors[name].dtype for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight")}
times = (values.down_proj.weight.float().norm() / right.down_proj.weight.float().norm()).item()
print(f"Qwen3: down_proj and lm_head are stored in {stored}; loaded, down_proj is {times:,.0f} times too large")
assert stored == {torch.float8_e4m3fn} and not report["missing_keys"] and times > 100, "it is loaded now"

save_as(root / "moe", Qwen3MoeConfig(**sizes, **heads, **experts, num_experts=4, moe_intermediate_size=64), in_fp8)
try:
    save_dequantised(root / "moe", root / "moe-saved", how)
except ValueError as error:
    print("Qwen3-MoE:", type(error).__name__, error)
else:
    raise AssertionError("a dequantised mixture of experts is saved now")
PYTHON
