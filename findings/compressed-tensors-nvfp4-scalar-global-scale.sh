#!/bin/sh
# NVFP4 decompresses to other values when weight_global_scale is stored as a scalar ([]) instead of [1].
#
# Versions: compressed-tensors 0.20.0, torch 2.13.0, on a CPU.
# Expected: one number is one number; both spellings are found in published checkpoints ([] is what ModelOpt writes and
#   compressed-tensors' own ModelOptNvfp4Converter keeps).
# Seen: about one value in eight differs, by up to 0.7%. `dequantize` divides the block scales, widened to BF16, by the
#   global scale. torch promotes BF16 with an F32 [1] to F32, but with an F32 [] it stays at BF16: the quotient is rounded.
# So: a converter that promises compressed-tensors' values hands the scale over as [1], whose values are those of F32.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.20.0 transformers==5.23.0
"$DIR/venv/bin/python" - <<'PYTHON'
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import preset_name_to_scheme

ROWS, COLS, GROUP = 64, 128, 16
torch.manual_seed(0)
packed = torch.randint(0, 256, (ROWS, COLS // 2), dtype=torch.uint8)
scale = (400 * torch.rand(ROWS, COLS // GROUP) + 1).to(torch.float8_e4m3fn)
global_scale = torch.tensor([2688 / 0.13])
scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])


def decompress(global_scale):
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}
    return NVFP4PackedCompressor.decompress(tensors, scheme)["weight"]


codes = unpack_fp4_from_uint8(packed, ROWS, COLS).float().unflatten(1, (-1, GROUP))
right = (codes * (scale.float() / global_scale).unsqueeze(-1)).flatten(1).to(torch.bfloat16)
array, scalar = decompress(global_scale), decompress(global_scale[0])
different = (scalar != array).float().mean().item()
relative = ((scalar.float() - array.float()).abs() / array.float().abs().clamp_min(1e-9)).max().item()
print(f"[1]: {(array != right).sum()} of {right.numel()} values differ from the product in F32, rounded once")
print(f"[]: {different:.1%} of the values differ from those with [1], by up to {relative:.2%}")
assert torch.equal(array, right), "the values with [1] are no longer those of F32"
assert 0.05 < different < 0.25, "the two spellings of the global scale have come together, or further apart"
PYTHON
