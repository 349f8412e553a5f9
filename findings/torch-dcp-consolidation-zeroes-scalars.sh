#!/bin/sh
# torch's own consolidation of sharded safetensors files writes 0 for every tensor without dimensions, without a word.
#
# Versions: torch 2.13.0, safetensors 0.8.0, numpy 2.4.6, on a CPU.
# Expected: consolidate_safetensors_files, and HuggingFaceStorageWriter(enable_consolidation=True), write the tensors of the shards.
# Seen: a scale of 3.5 with shape [] is 3.5 in the shard and 0.0 in the consolidated file; with shape [1] it stays 3.5. The other
#   tensors are right. (An integer tensor, such as packed codes, raises TypeError in place of that.)
# So: the scalar scales of FP8 and NVFP4 (ModelOpt's weight_scale, weight_scale_2, input_scale) are lost on this way: every weight
#   that they multiply becomes 0. Read the shards, or give the scales a dimension before saving.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
"$DIR/venv/bin/python" -W ignore - "$DIR" <<'PYTHON'
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

root = Path(sys.argv[1])
whole, shards, apart = root / "whole", root / "shards", root / "apart"
weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
tensors = {"weight": weight, "weight_scale": torch.tensor(3.5), "weight_scale_1": torch.tensor([3.5])}
files = dict.fromkeys(tensors, 1)
writer = HuggingFaceStorageWriter(str(whole), files, save_distributed=True, enable_consolidation=True)
dcp.save(tensors, storage_writer=writer, no_dist=True)
writer = HuggingFaceStorageWriter(str(shards), files, save_distributed=True)
dcp.save(tensors, storage_writer=writer, no_dist=True)
apart.mkdir()
consolidate_safetensors_files(str(shards), str(apart), files)

(shard,) = shards.glob("*.safetensors")
shard = load_file(shard)
assert all(torch.equal(shard[name], tensor) for name, tensor in tensors.items()), "the shard is wrong too"
print("shard:", shard["weight_scale"], shard["weight_scale_1"])
for folder in (whole, apart):
    (written,) = folder.glob("*.safetensors")
    written = load_file(written)
    print(f"consolidated in {folder.name}:", written["weight_scale"], written["weight_scale_1"])
    assert torch.equal(written["weight"], weight) and written["weight_scale_1"] == 3.5
    assert written["weight_scale"].shape == () and written["weight_scale"] == 0, "the scalar is kept now"

writer = HuggingFaceStorageWriter(str(root / "codes"), {"codes": 1}, save_distributed=True)
dcp.save({"codes": torch.arange(8, dtype=torch.uint8)}, storage_writer=writer, no_dist=True)
try:
    consolidate_safetensors_files(str(root / "codes"), str(apart), {"codes": 1})
except TypeError as error:
    print("integers:", type(error).__name__)
else:
    raise AssertionError("integers are consolidated now")
PYTHON
