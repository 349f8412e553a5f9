"""Checkpoints of no known model, written tensor by tensor, and what they should become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spellings import NAMES

from kconvert import Recipe, convert, inspect, plan, verify
from kconvert.proof.inventory import take_inventory

Tensors = dict[str, torch.Tensor]
Write = Callable[..., Path]


@pytest.fixture
def write(raw: Any, tmp_path: Path) -> Write:
    """`write(tensors, quantization)` is a checkpoint of no known model."""

    def make(tensors: Tensors, quantization: dict[str, Any], name: str = "source") -> Path:
        entries = {
            key: raw.Tensor(
                NAMES[t.dtype], list(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
            for key, t in tensors.items()
        }
        config = {"quantization_config": quantization}
        root: Path = raw.new(tmp_path / name, {"model.safetensors": entries}, config).save()
        return root

    return make


@pytest.fixture
def becomes(raw: Any, tmp_path: Path) -> Callable[..., None]:
    """`becomes(source, values)`: converted to BF16 (or `to`) it has these tensors, bit for bit, and `verify` agrees."""

    def check(source: Path, values: Tensors, to: str = "bf16") -> None:
        convert(plan(source, Recipe(to)), tmp_path / "out")
        written = raw.load(tmp_path / "out")
        assert sorted(written) == sorted(values)
        for name, value in values.items():
            assert (written[name].dtype, written[name].shape) == (NAMES[value.dtype], list(value.shape))
            assert written[name].data == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
        verify(source, tmp_path / "out")
        assert "quantization_config" not in written.config
        take_inventory(inspect(source))

    return check
