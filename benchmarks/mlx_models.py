"""Small models made by `--to mlx`, loaded and run by mlx-lm: their greedy tokens and logits beside those of transformers.

Both sides compute in F32: transformers from the BF16 twin of the same source, mlx-lm from codes and scales.

    pip install 'kconvert-toolkit[mlx,transformers]'
    python benchmarks/mlx_models.py [WORKDIR]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM

from kconvert import Recipe, convert, plan, verify
from kconvert.targets.sample import SampleRecipe, plan_synthetic

SIZES = {"layers": 3, "experts": 4, "hidden": 256, "moe_intermediate": 128, "vocab": 512, "heads": 4}
MODELS = ("kimi-k2-thinking", "qwen3-moe", "gpt-oss")
PROMPT, TOKENS = [11, 45, 200, 7, 99, 301], 24


def make(root: Path, like: str) -> tuple[Path, Path]:
    """The directory for mlx-lm, and the BF16 twin for transformers."""
    source, quantised, made, twin = (root / like / name for name in ("source", "int4", "mlx", "bf16"))
    convert(plan_synthetic(SampleRecipe(like, SIZES)), source)
    if like == "qwen3-moe":
        convert(plan(source, Recipe("int4")), quantised)
        source = quantised
    convert(plan(source, Recipe("mlx", scales="f32")), made)
    convert(plan(source, Recipe("bf16")), twin)
    assert all(comparison.equal for comparison in verify(source, made).comparisons)
    config = json.loads((twin / "config.json").read_text())
    if config["model_type"] == "kimi_k2":  # whose code is transformers' own DeepSeek-V3
        config.pop("auto_map")
        (twin / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
    return made, twin


def by_mlx(root: Path) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits of the prompt."""
    model, _ = load_model(root)
    model.set_dtype(mx.float32)  # of BF16 matrices mlx has no product by experts on a CPU
    tokens, first = list(PROMPT), None
    for _ in range(TOKENS):
        logits = np.array(model(mx.array([tokens]))[0])
        first = logits if first is None else first
        tokens.append(int(logits[-1].argmax()))
    assert first is not None
    return tokens, first


def by_transformers(root: Path) -> tuple[list[int], np.ndarray]:
    """The same."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, first = list(PROMPT), None
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        first = logits if first is None else first
        tokens.append(int(logits[-1].argmax()))
    assert first is not None
    return tokens, first


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        for like in MODELS:
            made, twin = make(Path(folder), like)
            (ours, mine), (theirs, wanted) = by_mlx(made), by_transformers(twin)
            off = np.linalg.norm(mine - wanted) / np.linalg.norm(wanted)
            alike = sum(a == b for a, b in zip(ours[len(PROMPT) :], theirs[len(PROMPT) :], strict=True))
            print(f"{like}: {alike} of {TOKENS} greedy tokens agree; logits differ by {off:.2e} (Frobenius, relative)")


if __name__ == "__main__":
    main()
