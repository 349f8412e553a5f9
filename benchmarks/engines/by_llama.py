"""Logits of a GGUF file by llama.cpp: python by_llama.py DIR RESULT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama
from prompt import TOKENS


def main(root: str, result: str) -> None:
    (file,) = Path(root).glob("*.gguf")
    model = Llama(str(file), n_ctx=64, n_batch=64, logits_all=True, verbose=False)
    model.eval(TOKENS)
    Path(result).write_text(json.dumps({"logits": np.array(model.scores[: len(TOKENS)]).tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
