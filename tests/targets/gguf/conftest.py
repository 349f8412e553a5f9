"""Small models as GGUF, read back by gguf's own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, ReaderTensor, quants
from kimi_release import as_released

from kconvert import Recipe, convert, plan
from kconvert.targets.sample import SampleRecipe, plan_synthetic

V4 = {"layers": 4, "heads": 2, "head": 128, "q_rank": 32, "o_rank": 32, "index_heads": 2, "index_head": 64}
DSA = {"layers": 2, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32, "heads": 2, "index_heads": 2}
SIZES: dict[str, dict[str, int]] = {
    "kimi-k2-thinking": {"layers": 2, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32, "heads": 2},
    "kimi-k2.5": {"layers": 2, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32, "heads": 2},
    "deepseek-v3": {"layers": 2, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32, "heads": 2},
    "kimi-k3": {"layers": 4, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32, "heads": 2},
    "deepseek-v4": V4,
    "deepseek-v4-base": V4,
    "deepseek-v3.2": DSA,
    "glm-5": DSA,
    "glm-5.3": {**DSA, "layers": 5},
    "qwen3-moe": {"layers": 2, "heads": 4, "kv_heads": 2, "head": 32},
    "gpt-oss": {"layers": 2, "heads": 4, "kv_heads": 2, "head": 32},
    "glm-4-moe": {"layers": 2, "dense_layers": 1, "intermediate": 256, "heads": 4, "kv_heads": 2, "head": 32},
    "minimax-m2": {"layers": 2, "heads": 4, "kv_heads": 2, "head": 128},
}
COMMON = {"experts": 4, "hidden": 128, "moe_intermediate": 64, "vocab": 320}


class Read:
    """GGUF files of one model: what gguf's reader says of them."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(root.glob("*.gguf"))
        self.readers = [GGUFReader(path) for path in self.files]
        self.tensors: dict[str, ReaderTensor] = {t.name: t for reader in self.readers for t in reader.tensors}

    def __getitem__(self, key: str) -> Any:
        """A value of the metadata."""
        return self.readers[0].fields[key].contents()

    def __contains__(self, key: str) -> bool:
        return key in self.readers[0].fields

    def values(self, name: str) -> Any:
        """The tensor as gguf dequantises it, in the order of dimensions that torch has."""
        tensor = self.tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]
        return quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)

    def type(self, name: str) -> str:
        return str(self.tensors[name].tensor_type.name)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`source(manifest)` is a small model; look, do not touch."""
    root = tmp_path_factory.mktemp("gguf")

    def make(name: str) -> Path:
        if not (root / name).exists():
            convert(plan_synthetic(SampleRecipe(name, {**COMMON, **SIZES[name]})), root / name)
            as_released(root / name)
        return root / name

    return make


@pytest.fixture
def to_gguf(tmp_path: Path) -> Callable[..., Read]:
    """`to_gguf(source, …)`: converted by a recipe with these fields, and read."""

    def make(root: Path, **options: Any) -> Read:
        convert(plan(root, Recipe("gguf", **options)), tmp_path / "gguf", overwrite=True)
        return Read(tmp_path / "gguf")

    return make
