"""Whether llama.cpp computes from a GGUF what transformers computes from the same weights in BF16: their logits, side by side.

    python benchmarks/llama_logits.py MODEL.gguf BF16_DIR [TOKENS]

TOKENS: of the prompt, 12; attention that compresses or chooses what it looks at (DeepSeek-V4, V3.2, GLM-5) needs some hundred.
Needs llama-cpp-python and transformers. llama.cpp rounds what goes into a matrix to the type that the matrix wants (BF16, or
eight bits in blocks for Q4_0, Q8_0, MXFP4 and NVFP4), transformers computes here in F32: the difference is that arithmetic.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

PROMPT = [7, 42, 99, 3, 250, 11, 180, 64, 5, 201, 33, 77]


def prompt_of(tokens: int) -> list[int]:
    """So many tokens of a vocabulary of 252 and more."""
    return [(token + 37 * turn) % 252 for turn in range(-(-tokens // len(PROMPT))) for token in PROMPT][:tokens]


def by_llama(path: str, prompt: list[int]) -> np.ndarray[Any, Any]:
    """Logits [tokens, vocabulary]."""
    from llama_cpp import Llama

    size = max(64, len(prompt))
    model = Llama(path, n_ctx=size, n_batch=size, n_ubatch=size, logits_all=True, verbose=False, n_threads=2)
    model.eval(prompt)
    return np.array(model.scores[: len(prompt)])


def by_transformers(root: str, prompt: list[int]) -> np.ndarray[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    return np.asarray(logits.numpy())


def main(gguf: str, root: str, tokens: str = str(len(PROMPT))) -> int:
    prompt = prompt_of(int(tokens))
    ours, theirs = by_llama(gguf, prompt), by_transformers(root, prompt)
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
