"""llama.cpp itself loads what `--to gguf` writes, and computes what transformers does; skipped where it is not installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kconvert import Recipe, convert, plan

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "llama_logits.py"
MODELS = {"deepseek-v4": 150}  # and of how many tokens: more than a layer compresses to one


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_those_of_transformers(
    source: Callable[[str], Path], to_gguf: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("llama_cpp")
    (file,) = to_gguf(source(name)).files
    convert(plan(source(name), Recipe("bf16")), tmp_path / "bf16")
    command = [sys.executable, str(SCRIPT), str(file), str(tmp_path / "bf16"), str(MODELS[name])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
