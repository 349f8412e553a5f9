"""llama.cpp itself loads what `--to gguf` writes, and computes what transformers does; skipped where it is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kconvert import Recipe, convert, plan

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "llama_logits.py"
MODELS = {
    "deepseek-v4": 150,
    "deepseek-v3.2": 40,
    "glm-5": 40,
    "glm-5.3": 40,
}  # and how many tokens: V4 makes one of 128


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_those_of_transformers(
    source: Callable[[str], Path], to_gguf: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("llama_cpp")
    root = source(name)
    (file,) = to_gguf(root).files
    if "quantization_config" in json.loads((root / "config.json").read_text()):
        convert(plan(root, Recipe("bf16")), tmp_path / "bf16")
        root = tmp_path / "bf16"
    command = [sys.executable, str(SCRIPT), str(file), str(root), str(MODELS[name])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
