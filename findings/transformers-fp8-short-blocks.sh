#!/bin/sh
# An FP8 weight in blocks of 128x128 whose rows are no multiple of 128 is read with the scales of other blocks, without a word.
#
# Versions: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, on a CPU (where FP8 is dequantised on loading).
# Expected: the layout of DeepSeek-V3 (whose kv_a_proj_with_mqa has 576 rows): scale [i, j] belongs to rows 128 i to
#   128 i + 127; the last block may be short. A weight [192, 256] has scales [2, 2], of 128 and of 64 rows.
# Seen: the loader takes the height of a block as rows // scale rows, which is 96 here: rows 96 to 127 get the second scale.
#   The load report is clean. (Where the division leaves a rest it raises ValueError instead.)
# So: engines differ about such checkpoints; logits from transformers are no judge of them.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
"$DIR/venv/bin/python" - "$DIR/model" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

ROWS, COLS = 192, 256
NAME = "model.layers.0.mlp.gate_proj"
root = Path(sys.argv[1])
sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 512}
config = Qwen3Config(hidden_size=COLS, intermediate_size=ROWS, **sizes)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
others = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != NAME]
model.save_pretrained(root)

# Every code is 1, so that a value is its scale: 1 for the rows of the first block, 2 for those of the second.
tensors = load_file(root / "model.safetensors")
tensors[f"{NAME}.weight"] = torch.ones(ROWS, COLS).to(torch.float8_e4m3fn)
tensors[f"{NAME}.weight_scale_inv"] = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
save_file(tensors, root / "model.safetensors", {"format": "pt"})
declared = json.loads((root / "config.json").read_text())
declared["quantization_config"] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": others,
}
(root / "config.json").write_text(json.dumps(declared))

loaded, report = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16, output_loading_info=True)
values = loaded.get_submodule(NAME).weight
first = int((values[:, 0] != 1).nonzero()[0])
print(f"load report: {({key: list(found) for key, found in report.items() if found}) or 'clean'}")
print(f"the second scale begins at row {first}, where 128 was written")
assert not any(report.values()), "the load report has something to say now"
assert values.dtype == torch.bfloat16, "the weight is no longer dequantised"
assert first == 96, "the height of a block is no longer rows // scale rows"
PYTHON
