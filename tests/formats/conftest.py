"""Formats used as the engine uses them, but on torch tensors; and checkpoints of no known model, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from spellings import NAMES

import kconvert
from kconvert import Recipe, convert, inspect, plan, verify
from kconvert.formats import Format
from kconvert.native import compiling
from kconvert.native.base import Loop
from kconvert.proof.inventory import take_inventory

Tensors = dict[str, torch.Tensor]
Write = Callable[..., Path]
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
}


@pytest.fixture(autouse=True)
def numba_compiles_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it made loads without it: no kernel has need of numba in the process that runs it."""

    def refuse(loop: Loop) -> None:
        raise AssertionError(f"the object file of {loop} does not load")

    monkeypatch.setattr(compiling, "compiled", refuse)


class Codec:
    """Encode and decode whole weights, in tiles of `tile_rows` rows."""

    tile_rows = 8

    def encode(self, format: Format, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
        """A weight -> its tensors by suffix, and the number of groups that lost something."""
        rows, cols = weight.shape
        parts = format.parts(rows, cols)
        outputs = [np.zeros(part.nbytes, np.uint8) for part in parts]
        lost = 0
        format.settle(float(weight.abs().amax()) if weight.numel() else 0.0, outputs)
        for first in range(0, rows, self.tile_rows):
            last = min(first + self.tile_rows, rows)
            cuts = [data[slice(*part.span(rows, first, last))] for part, data in zip(parts, outputs, strict=True)]
            lost += format.encode(np.ascontiguousarray(weight[first:last].float().numpy()), cuts)
        for part, data in zip(parts, outputs, strict=True):
            if part.constant is not None:
                data[:] = np.frombuffer(part.constant, np.uint8)
        tensors = {
            part.suffix: torch.frombuffer(bytearray(data), dtype=DTYPES[part.dtype]).view(part.shape)
            for part, data in zip(parts, outputs, strict=True)
        }
        return tensors, lost

    def decode(self, format: Format, tensors: Mapping[str, torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        """Tensors by suffix -> the weight [rows, cols] in f32."""
        parts = format.parts(rows, cols)
        inputs = []
        for part in parts:
            tensor = tensors[part.suffix]
            assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[part.dtype], part.shape), part.suffix
            inputs.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        weight = np.empty((rows, cols), np.float32)
        for first in range(0, rows, self.tile_rows):
            last = min(first + self.tile_rows, rows)
            cuts = [data[slice(*part.span(rows, first, last))] for part, data in zip(parts, inputs, strict=True)]
            format.decode(cuts, first, weight[first:last])
        return torch.from_numpy(weight)


@pytest.fixture(scope="session")
def codec() -> Codec:
    return Codec()


@pytest.fixture(scope="session", params=["kimi_k26_slice", "qwen_rtn_slice"])
def real_slice(request: pytest.FixtureRequest) -> tuple[str, dict[str, torch.Tensor]]:
    """Tensors of a published INT4 release and its BF16 weight; see data/README.md."""
    root = Path(__file__).parents[1] / "data"
    convention = "kimi" if "kimi" in request.param else "compressed-tensors"
    return convention, safetensors.torch.load_file(root / f"{request.param}.safetensors")


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


def check_opened(source: Path, values: Tensors) -> None:
    """`kconvert.open` has the same tensors, also in rows that begin and end anywhere."""
    with kconvert.open(source) as weights:
        assert sorted(weights) == sorted(values)
        for name, value in values.items():
            first, last = (len(value) // 3, len(value) // 2 + 1) if value.dim() and len(value) else (0, 0)
            pairs = [(weights[name], value)]
            pairs += [(weights.rows(name, first, last), value[first:last])] if value.dim() else []
            for mine, wanted in pairs:
                assert (mine.dtype, mine.shape) == (wanted.dtype, wanted.shape), name
                assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (mine, wanted))), name


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
        if to == "bf16":
            check_opened(source, values)
        verify(source, tmp_path / "out")
        assert "quantization_config" not in written.config
        take_inventory(inspect(source))

    return check
