"""What the tasks of a weight need in common is read once: matrices that lie across in the file, and small parts."""

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
Reads = Counter[tuple[str, int]]  # of what begins at a place of a file, by these


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


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Reads:
    fetched, fetch = Reads(), Reader.fetch

    def counted(self: Reader, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        fetched[file, start] += 1
        return fetch(self, file, start, nbytes, room)

    monkeypatch.setattr(Reader, "fetch", counted)
    return fetched


@pytest.mark.parametrize("threads", [1, 5])
def test_each_byte_of_the_codes_is_read_once(
    across: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Reads, threads: int
) -> None:
    source, _ = across
    monkeypatch.setattr("kconvert.run.tiles.SMALL", 0)
    work = plan(source, Recipe("bf16"))
    convert(work, tmp_path / "out", threads=threads, memory=100_000)
    codes = [step.reads[0] for step in work.steps]
    assert [fetched[place.file, place.start] for place in codes] == [1, 1, 1, 1]


def test_what_the_tasks_of_a_weight_share_counts_as_memory(across: Any) -> None:
    from kconvert.run.engine import Limits

    work = plan(across[0], Recipe("bf16"))
    codes = max(step.source_parts[0].nbytes for step in work.steps)
    few, many = (Limits(threads, 1).peak(work) for threads in (1, 2))
    assert many - few > codes


@pytest.mark.parametrize("threads", [1, 5])
def test_scales_and_shapes_are_not_read_again_for_every_task(
    sample: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Reads, threads: int
) -> None:
    work = plan(sample(tmp_path / "source", layers=1, dense_layers=0, experts=2), Recipe("bf16"))
    weights = [step for step in work.steps if len(step.reads) == 3]
    monkeypatch.setattr("kconvert.run.tiles.SMALL", max(step.source_parts[1].nbytes for step in weights))
    convert(work, tmp_path / "out", threads=threads, memory=threads * 20_000)
    assert len(weights) == 6
    for step in weights:
        codes, *small = step.reads
        assert [fetched[place.file, place.start] for place in small] == [1, 1]
        slices = range(codes.start, codes.start + step.source_parts[0].nbytes)
        assert sum(file == codes.file and start in slices for file, start in fetched) > 1  # a slice of the codes a task
