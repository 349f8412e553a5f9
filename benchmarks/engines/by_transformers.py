"""Logits of a checkpoint by transformers on the CPU, in BF16: python by_transformers.py DIR RESULT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prompt import TOKENS


def main(root: str, result: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16, output_loading_info=True)
    absent = sorted(loading["missing_keys"])
    if absent:
        sys.exit(f"{len(absent)} missing keys, {absent[0]} the first")
    with torch.no_grad():
        logits = model.eval()(torch.tensor([TOKENS])).logits[0].float()
    Path(result).write_text(json.dumps({"logits": logits.tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
