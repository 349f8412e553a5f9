"""The bytes that a run writes, however it is run."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kconvert import Recipe, convert, plan

Tree = Callable[[Path], "dict[str, bytes]"]


@pytest.mark.parametrize(
    ("threads", "memory"),
    [(1, 70_000), (1, 1 << 20), (1, 256 << 20), (2, 70_000), (2, 1 << 20), (4, 1), (4, 70_000), (4, 256 << 20)],
)
def test_threads_and_memory_change_no_byte(
    int4: Path, bf16: Path, tmp_path: Path, tree: Tree, threads: int, memory: int
) -> None:
    convert(plan(int4, Recipe("bf16", shard_size=1_000_000)), tmp_path / "out", threads=threads, memory=memory)

    assert tree(tmp_path / "out") == tree(bf16)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_scattered_source_gives_the_same_bytes(
    scattered: Path, bf16: Path, tmp_path: Path, tree: Tree, threads: int
) -> None:
    convert(plan(scattered, Recipe("bf16", shard_size=1_000_000)), tmp_path / "out", threads=threads, memory=100_000)

    assert tree(tmp_path / "out") == tree(bf16)


def test_a_scattered_source_has_weights_in_several_files(scattered: Path) -> None:
    files = json.loads((scattered / "model.safetensors.index.json").read_text())["weight_map"]
    stem = "model.layers.1.mlp.experts.0.gate_proj.weight_"

    assert len({files[stem + part] for part in ("packed", "scale", "shape")}) == 3


@pytest.mark.parametrize("shard_size", [1, 300_000, 10**12])
def test_shard_sizes_change_no_value(int4: Path, bf16: Path, tmp_path: Path, raw: Any, shard_size: int) -> None:
    convert(plan(int4, Recipe("bf16", shard_size=shard_size)), tmp_path / "out")

    ours, theirs = raw.load(tmp_path / "out"), raw.load(bf16)
    assert len(ours.files) != len(theirs.files)
    assert {name: ours[name] for name in ours} == {name: theirs[name] for name in theirs}


def test_every_shard_says_that_it_is_pytorch_s(bf16: Path) -> None:
    shards = sorted(bf16.glob("*.safetensors"))
    assert shards
    for shard in shards:
        content = shard.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_safetensors_itself_reads_every_shard(bf16: Path) -> None:
    from safetensors import safe_open

    index = json.loads((bf16 / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(index.values()):
        with safe_open(bf16 / shard, "pt") as file:
            assert sorted(file.keys()) == sorted(name for name, where in index.items() if where == shard)


def test_side_files_are_copied_byte_for_byte(int4: Path, bf16: Path, tree: Tree) -> None:
    def side_files(root: Path) -> dict[str, bytes]:
        made = ("config.json", "model.safetensors.index.json")
        return {n: data for n, data in tree(root).items() if not n.endswith(".safetensors") and n not in made}

    assert {"LICENSE", "chat_template.jinja", "tiktoken.model", "modeling_deepseek.py"} <= side_files(int4).keys()
    assert any(name.startswith("docs/") for name in side_files(int4))
    assert side_files(bf16) == side_files(int4)


def test_tensors_that_are_not_quantised_keep_dtype_and_bytes(int4: Path, bf16: Path, raw: Any) -> None:
    before, after = raw.load(int4), raw.load(bf16)
    kept = [name for name in before if not name.rpartition(".")[2].startswith("weight_")]

    assert any(name.endswith("e_score_correction_bias") for name in kept)
    assert [name for name in kept if before[name] != after[name]] == []
    assert after["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"


def test_the_index_counts_bytes_and_parameters(bf16: Path, raw: Any) -> None:
    tensors = raw.load(bf16)
    metadata = json.loads((bf16 / "model.safetensors.index.json").read_text())["metadata"]

    assert metadata["total_size"] == sum(len(tensors[name].data) for name in tensors)
    width = {"BF16": 2, "F32": 4}
    assert metadata["total_parameters"] == sum(len(tensors[n].data) // width[tensors[n].dtype] for n in tensors)


def test_progress_reaches_the_size_of_the_tensors(int4: Path, tmp_path: Path, raw: Any) -> None:
    work = plan(int4, Recipe("bf16"))
    lock, written = threading.Lock(), 0

    def advance(nbytes: int) -> None:
        nonlocal written
        with lock:
            written += nbytes

    convert(work, tmp_path / "out", advance=advance, threads=4)

    tensors = raw.load(tmp_path / "out")
    assert sum(len(tensors[name].data) for name in tensors) <= written <= work.output_bytes


def test_the_plan_says_the_bytes_of_the_output_exactly(int4: Path, tmp_path: Path, tree: Tree) -> None:
    work = plan(int4, Recipe("bf16"))

    convert(work, tmp_path / "out")

    assert sum(map(len, tree(tmp_path / "out").values())) == work.output_bytes


def test_a_run_closes_every_file_that_it_opened(int4: Path, tmp_path: Path) -> None:
    work = plan(int4, Recipe("bf16", shard_size=100_000))
    before = len(os.listdir("/proc/self/fd"))

    convert(work, tmp_path / "out")

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_of_empty_tensors_is_finished_like_any_other(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    source = tmp_path / "src"
    source.mkdir()
    packed = {"a.weight_packed": torch.zeros(4, 4, dtype=torch.int32), "a.weight_scale": torch.ones(4, 1).bfloat16()}
    save_file({**packed, "empty": torch.zeros(0, 3), "none": torch.zeros(2, 0)}, source / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    (source / "config.json").write_text(json.dumps({"quantization_config": quantization}))

    convert(plan(source, Recipe("bf16", shard_size=1)), tmp_path / "dst")

    shards = sorted((tmp_path / "dst").glob("*.safetensors"))
    names = {name for shard in shards for name in load_file(shard)}
    assert names == {"a.weight", "empty", "none"}
