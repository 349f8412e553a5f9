"""Logits of a checkpoint by mlx-lm: python by_mlx.py DIR RESULT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model
from prompt import TOKENS


def main(root: str, result: str) -> None:
    model, _ = load_model(Path(root))
    model.set_dtype(mx.float32)  # of BF16 matrices mlx has no product by experts on a CPU
    logits = model(mx.array([TOKENS]))[0]
    Path(result).write_text(json.dumps({"logits": logits.tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
