#!/bin/sh
# MLX loads a GGUF file with MXFP4 or NVFP4 tensors as far as the first of them, and says nothing of the rest.
#
# Versions: mlx 0.32.4 with its CPU backend, gguf 0.19.0, numpy 2.4.6.
# Expected: every tensor, or an error, as for the types that MLX knows but cannot read ("gguf_tensor_to_f16 failed" for Q5_K).
# Seen for a file of five tensors, the third of which is MXFP4: mx.load returns the first two. With the MXFP4 one at the head of
#   the file it returns an empty dict, of a valid file. NVFP4, TQ1_0, TQ2_0 and Q1_0 likewise. And BF16 becomes F16: 1e5 is
#   infinite, 1e-8 is 0.
# So: gpt-oss in GGUF, whose experts are MXFP4, loses whatever lies behind them; count the tensors after mx.load.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" gguf==0.19.0 numpy==2.4.6
"$DIR/venv/bin/python" - "$DIR/model.gguf" <<'PYTHON'
import sys

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

PATH = sys.argv[1]
weights = np.random.default_rng(0).standard_normal((4, 256)).astype("f4")


def write(*types):
    writer = gguf.GGUFWriter(PATH, "llama")
    for number, kind in enumerate(types):
        size, bytes_ = gguf.GGML_QUANT_SIZES[kind]
        zeros = np.zeros((4, 256 // size * bytes_), np.uint8)  # where gguf has no quantiser
        data = zeros if kind in (Type.NVFP4, Type.Q1_0) else gguf.quants.quantize(weights, kind)
        writer.add_tensor(str(number), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert [tensor.tensor_type for tensor in gguf.GGUFReader(PATH).tensors] == list(types), "this script writes wrong"
    return sorted(mx.load(PATH))


print("five of F32:", write(*[Type.F32] * 5))
for kind in (Type.MXFP4, Type.NVFP4, Type.TQ1_0, Type.TQ2_0, Type.Q1_0):
    third = write(Type.F32, Type.F32, kind, Type.F32, Type.F32)
    first = write(kind, Type.F32, Type.F32)
    print(f"the third of five is {kind.name}: {third}; the first of three is: {first}")
    assert third == ["0", "1"] and first == [], "the tensors behind it are loaded now, or it is refused"
try:
    write(Type.F32, Type.Q5_0)
except RuntimeError as error:
    print("Q5_0:", error)
else:
    raise AssertionError("Q5_0 is read now")

weights = np.full((4, 256), 1e5, "f4")
weights[1] = 1e-8
write(Type.F32, Type.BF16)
read = mx.load(PATH)["1"]
print("BF16 of 1e5 and 1e-8:", read.dtype, *np.array(read)[:2, 0])
assert read.dtype == mx.float16 and np.array(read)[:2, 0].tolist() == [np.inf, 0], "BF16 stays BF16 now"
PYTHON
