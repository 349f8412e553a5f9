"""What `repack-amx` writes: the same bytes from any source, threads, memory and interruptions; files of either form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from amx_packing import Tree, load, repack

from kconvert.formats.reference import amx as reference
from kconvert.models.amx import open_amx


@pytest.mark.parametrize("scales", ["amax", "mse"])
@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_straight_from_int4_and_by_way_of_bf16_are_the_same_bytes(
    source: Path, dense: Path, tmp_path: Path, method: str, scales: str
) -> None:
    straight = load(repack(source, tmp_path / "straight", method, 2, scales=scales))
    by_way = load(repack(dense, tmp_path / "by-way", method, 2, scales=scales))
    assert straight.keys() == by_way.keys()
    assert all(torch.equal(straight[name], by_way[name]) for name in straight)


@pytest.mark.parametrize("numa", [1, 2, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_each_shard_is_the_packing_of_its_slice(
    source: Path, dense: Path, tmp_path: Path, bits: int, numa: int
) -> None:
    """First split, then quantise."""
    packed = load(repack(source, tmp_path / "out", f"AMXINT{bits}", numa, scales="amax"))
    weights = load(dense)
    for projection, axis in {"gate": 0, "up": 0, "down": 1}.items():
        weight = weights[f"model.layers.2.mlp.experts.1.{projection}_proj.weight"]
        for n, piece in enumerate(weight.chunk(numa, axis)):
            data, scale = reference.encode(piece, bits)
            stem = f"blk.2.ffn_{projection}_exps.1.numa.{n}"
            assert torch.equal(packed[f"{stem}.weight"], data)
            assert torch.equal(packed[f"{stem}.scale"], scale)


def test_the_loader_finds_names_and_numbers_without_a_gap(two: Path) -> None:
    names = load(two).keys()
    expected = {
        f"blk.{layer}.ffn_{projection}_exps.{expert}.numa.{numa}.{kind}"
        for layer in (1, 2)
        for projection in ("gate", "up", "down")
        for expert in range(3)
        for numa in range(2)
        for kind in ("weight", "scale")
    }
    assert names == expected


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("memory", [1, 300_000, 256 << 20])
def test_threads_and_memory_change_no_byte(
    source: Path, two: Path, tmp_path: Path, tree: Tree, threads: int, memory: int
) -> None:
    assert tree(repack(source, tmp_path / "out", "AMXINT4", 2, threads=threads, memory=memory)) == tree(two)


@pytest.mark.parametrize("form", ["safetensors", "kt"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, tree: Tree, form: str
) -> None:
    options: dict[str, Any] = {"form": form, "shard_size": 300_000}
    whole = tree(repack(source, tmp_path / "whole", "AMXINT4", 2, **options))
    written = 0

    def stop(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if written > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(source, tmp_path / "out", "AMXINT4", 2, advance=stop, **options)
    begun = tree(tmp_path / "out")
    assert begun
    assert "kconvert.json" not in begun
    stamps = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in begun}
    assert tree(repack(source, tmp_path / "out", "AMXINT4", 2, **options)) == whole
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in begun} == stamps


def test_the_kt_tree_holds_the_same_bytes_file_by_file(source: Path, two: Path, tmp_path: Path, tree: Tree) -> None:
    files = tree(repack(source, tmp_path / "kt", "AMXINT4", 2, form="kt"))
    for name, tensor in load(two).items():
        _, layer, projection, expert, _, numa, kind = re.split(r"\.", name)
        projection = projection.removeprefix("ffn_").removesuffix("_exps")
        data = tensor.numpy().tobytes()
        kind = "quant" if kind == "weight" else "scale"
        path = f"_layer_{layer}/_numa_{numa}/INT4_{projection}_{expert}_{len(data)}Byte_{kind}_.kt"
        assert files.pop(path) == data
    assert files.keys() == {"config.json", "kconvert.json"}


def test_overwriting_a_kt_tree_leaves_no_file_of_it(source: Path, two: Path, tmp_path: Path, tree: Tree) -> None:
    repack(source, tmp_path / "out", "AMXINT8", 4, form="kt")
    assert tree(repack(source, tmp_path / "out", "AMXINT4", 2, overwrite=True)) == tree(two)
    assert open_amx(tmp_path / "out").method == "AMXINT4"


def test_the_rest_goes_along_under_kt_kernels_names(source: Path, two: Path, tmp_path: Path) -> None:
    packed = load(repack(source, tmp_path / "out", "AMXINT4", 2, with_rest=True, shard_size=700_000))
    experts = load(two)
    assert all(torch.equal(packed[name], experts[name]) for name in experts)
    rest = {name: tensor for name, tensor in load(source).items() if ".mlp.experts." not in name}
    renamed = {
        name.replace("model.layers.", "blk.").replace("model.", "") if name.startswith("model.") else name: tensor
        for name, tensor in rest.items()
    }
    assert packed.keys() == experts.keys() | renamed.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in renamed.items())
    assert (tmp_path / "out" / "tiktoken.model").exists()


def test_the_first_files_hold_experts(source: Path, tmp_path: Path) -> None:
    """KTransformers' `kt` command looks at three."""
    root = repack(source, tmp_path / "out", "AMXINT4", 2, with_rest=True, shard_size=300_000)
    for path in sorted(root.glob("*.safetensors"))[:3]:
        assert any(".numa." in name for name in safetensors.torch.load_file(path))
