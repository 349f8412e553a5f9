"""Weights whose matrices lie across in the file: every task of one needs all of its bytes, which are read once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from gptq_packing import make

from kconvert import Recipe, convert, plan
from kconvert.checkpoint.source import Reader

Tree = Callable[[Path], "dict[str, bytes]"]


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GPTQ checkpoint of weights of several shapes, and their values."""
    root = tmp_path_factory.mktemp("across")
    tensors, values = {}, {}
    for number, (rows, cols) in enumerate([(512, 256), (96, 640), (40, 32), (512, 256)]):
        made, value = make(rows, cols, 32, 4, "gptq", ordered=number == 3)
        tensors |= {f"layers.{number}.up.{suffix}": tensor for suffix, tensor in made.items()}
        values[f"layers.{number}.up.weight"] = value
    safetensors.torch.save_file(tensors, root / "model.safetensors")
    table = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    (root / "config.json").write_text(json.dumps({"quantization_config": table}))
    return root, values


@pytest.mark.parametrize(("threads", "memory"), [(1, 1), (1, 1 << 20), (3, 1), (4, 100_000), (8, 256 << 20)])
def test_threads_and_memory_change_no_value(across: Any, tmp_path: Path, threads: int, memory: int) -> None:
    source, values = across
    convert(plan(source, Recipe("bf16", shard_size=300_000)), tmp_path / "out", threads=threads, memory=memory)
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name


@pytest.mark.parametrize("threads", [1, 5])
def test_each_byte_of_the_codes_is_read_once(
    across: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    source, _ = across
    work, fetched = plan(source, Recipe("bf16")), Counter[int]()
    fetch = Reader.fetch

    def counted(self: Reader, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        fetched[start] += 1
        return fetch(self, file, start, nbytes, room)

    monkeypatch.setattr(Reader, "fetch", counted)
    convert(work, tmp_path / "out", threads=threads, memory=100_000)
    starts = [step.reads[0].start for step in work.steps]
    assert len(starts) == 4
    assert [fetched[start] for start in starts] == [1, 1, 1, 1]


def test_what_the_tasks_of_a_weight_share_counts_as_memory(across: Any) -> None:
    from kconvert.run.engine import Limits

    work = plan(across[0], Recipe("bf16"))
    codes = max(step.source_parts[0].nbytes for step in work.steps)
    few, many = (Limits(threads, 1).peak(work) for threads in (1, 2))
    assert many - few > codes
