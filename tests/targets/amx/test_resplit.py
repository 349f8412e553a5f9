"""`repack-amx --from-amx`: other shards of the same codes and scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from amx_packing import HIDDEN, INTERMEDIATE, Tree, load, repack, resplit, run

from kconvert.formats.reference import amx as reference


@pytest.mark.parametrize("numa", [2, 4])
def test_resplitting_keeps_every_code_and_scale(source: Path, two: Path, tmp_path: Path, numa: int) -> None:
    again, packed = load(resplit(two, tmp_path / "out", numa)), load(two)
    fresh = load(repack(source, tmp_path / "fresh", "AMXINT4", numa))
    for name in fresh:
        if "_down_" not in name:
            assert torch.equal(again[name], fresh[name])  # rows have their own scales
    for n in range(numa):
        stem, ours = "blk.1.ffn_down_exps.2.numa", f"{n * 2 // numa}"
        assert torch.equal(again[f"{stem}.{n}.scale"], packed[f"{stem}.{ours}.scale"])
    codes = [unpack_down(tensors, count) for tensors, count in ((again, numa), (packed, 2))]
    assert torch.equal(*codes)


def unpack_down(tensors: dict[str, torch.Tensor], numa: int) -> torch.Tensor:
    names = [f"blk.1.ffn_down_exps.2.numa.{n}.weight" for n in range(numa)]
    return torch.cat([reference.unpack(tensors[name], HIDDEN, INTERMEDIATE // numa, 4) for name in names], 1)


def test_weights_of_unknown_origin_are_split_again_and_again(two: Path, tmp_path: Path, raw: Any) -> None:
    raw.load(two).save(tmp_path / "bare")
    resplit(resplit(tmp_path / "bare", tmp_path / "once", 2), tmp_path / "twice", 4)
    assert json.loads((tmp_path / "twice" / "kconvert.json").read_text())["scales"] == "unknown"
    once, twice = load(resplit(two, tmp_path / "four", 4)), load(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_merging_shards_is_refused_and_says_why(two: Path, tmp_path: Path) -> None:
    result = run("repack-amx", "--from-amx", two, tmp_path / "out", "--numa", 1)
    assert result.exit_code == 2
    assert "down" in result.stderr
    assert "2, 4" in result.stderr
    assert not (tmp_path / "out").exists()


def test_resplitting_to_a_kt_tree_and_back_gives_the_same_files(two: Path, tmp_path: Path, tree: Tree) -> None:
    resplit(two, tmp_path / "kt", 2, "kt")
    back = tree(resplit(tmp_path / "kt", tmp_path / "back", 2))
    shards = {name: data for name, data in tree(two).items() if name.endswith(".safetensors")}
    assert {name: data for name, data in back.items() if name.endswith(".safetensors")} == shards
