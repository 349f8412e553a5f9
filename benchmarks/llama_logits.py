"""Whether llama.cpp computes from a GGUF what transformers computes from the same weights in BF16: their logits, side by side.

    python benchmarks/llama_logits.py MODEL.gguf BF16_DIR

Needs llama-cpp-python and transformers. llama.cpp rounds what goes into a matrix to the type that the matrix wants (BF16, or
eight bits in blocks for Q4_0, Q8_0, MXFP4 and NVFP4), transformers computes here in F32: the difference is that arithmetic.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

PROMPT = [7, 42, 99, 3, 250, 11, 180, 64, 5, 201, 33, 77]


def by_llama(path: str) -> np.ndarray[Any, Any]:
    """Logits [tokens, vocabulary]."""
    from llama_cpp import Llama

    model = Llama(path, n_ctx=64, n_batch=64, logits_all=True, verbose=False, n_threads=2)
    model.eval(PROMPT)
    return np.array(model.scores[: len(PROMPT)])


def by_transformers(root: str) -> np.ndarray[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    return np.array(logits)


def main(gguf: str, root: str) -> int:
    ours, theirs = by_llama(gguf), by_transformers(root)
    error, spread = np.abs(ours - theirs), theirs.std()
    agree = (ours.argmax(1) == theirs.argmax(1)).sum()
    cosine = (ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum())
    print(f"logits {list(ours.shape)}: standard deviation {spread:.4g}, cosine {cosine:.7f}")
    print(
        f"difference: largest {error.max():.4g}, mean {error.mean():.4g}; the same first token at {agree} of {len(ours)}"
    )
    return int(error.mean() > 0.05 * spread or not np.isfinite(ours).all())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
