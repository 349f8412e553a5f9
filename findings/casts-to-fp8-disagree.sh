#!/bin/sh
# The same float is another FP8 (E4M3) by every library, where it is above 464, infinite or NaN.
#
# Versions: torch 2.13.0 (CPU), ml_dtypes 0.6.0 (numpy's and JAX's FP8), mlx 0.32.4 (CPU), numpy 2.4.6.
# Expected: one rounding for one format; within the range, to 448, all three agree, ties and subnormal numbers included.
# Seen for 465, 1e6, inf and NaN: torch says 448, 448, 448 and NaN; ml_dtypes NaN four times; MLX 448 four times: a NaN has become
#   a number. To E5M2 torch does not saturate: 61440 and more are infinite, as by ml_dtypes.
# So: whoever casts without clamping gets NaN weights from one library and clipped ones from the other; and a check for NaN after
#   MLX's cast finds none. Clamp to +-448 and look for NaN before the cast.
set -eu
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
"${PYTHON:-python3}" -m venv "$DIR/venv"
"$DIR/venv/bin/pip" install --quiet torch==2.13.0 ml_dtypes==0.6.0 "mlx[cpu]==0.32.4" numpy==2.4.6
"$DIR/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import mlx.core as mx
import numpy as np
import torch


def by_torch(values):
    return torch.tensor(values).to(torch.float8_e4m3fn).float().numpy()


def by_ml_dtypes(values):
    return values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def by_mlx(values):
    return np.array(mx.from_fp8(mx.to_fp8(mx.array(values)), mx.float32))


CASTS = (by_torch, by_ml_dtypes, by_mlx)
ordinary = (np.arange(0x43E80001, dtype=np.uint32)[:: 1 << 12]).view("f4")  # 0 to 464, more finely than BF16
ordinary = np.concatenate([ordinary, -ordinary])
first = by_torch(ordinary).view("u4")
assert all(np.array_equal(cast(ordinary).view("u4"), first) for cast in CASTS), "they disagree within the range too"
print(f"{len(ordinary):,} values to 464: all three agree")

outside = np.array([465, 1e6, np.inf, np.nan], np.float32)
seen = {cast.__name__: [str(value) for value in cast(outside)] for cast in CASTS}
for name, values in seen.items():
    print(name, outside.tolist(), "->", *values)
assert seen == {
    "by_torch": ["448.0", "448.0", "448.0", "nan"],
    "by_ml_dtypes": ["nan"] * 4,
    "by_mlx": ["448.0"] * 4,
}, "somebody casts otherwise now"
large = np.array([61439, 61440], np.float32)
wide = torch.tensor(large).to(torch.float8_e5m2).float().tolist()
print("torch to E5M2", large.tolist(), "->", wide)
assert wide == [57344, np.inf] and large.astype(ml_dtypes.float8_e5m2).tolist() == wide
PYTHON
