"""NVFP4 of models whose experts go by different names, and are in different encodings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kconvert import KconvertError, Recipe, convert, plan, verify


@pytest.mark.parametrize("name", ["deepseek-v4", "kimi-k3", "qwen3.5-moe", "glm-4-moe"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_other_models_become_nvfp4(small_sample: Callable[[str], Path], tmp_path: Path, name: str, layout: str) -> None:
    source = small_sample(name)
    if (name, layout) == ("deepseek-v4", "compressed-tensors"):
        with pytest.raises(KconvertError, match="it has modelopt"):
            plan(source, Recipe("nvfp4", layout=layout))
        return
    convert(plan(source, Recipe("nvfp4", layout=layout)), tmp_path / "out")
    verify(source, tmp_path / "out")
