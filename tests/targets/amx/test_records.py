"""What a directory of AMX weights says of itself, and what `inspect` reads back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from amx_packing import HIDDEN, INTERMEDIATE, repack, run

import kconvert
from kconvert.models.amx import open_amx


def test_method_numa_shapes_and_origin_are_in_every_header_and_in_kconvert_json(source: Path, tmp_path: Path) -> None:
    root = repack(source, tmp_path / "out", "AMXINT8", 2, shard_size=1_000_000)
    record = json.loads((root / "kconvert.json").read_text())
    assert (record["method"], record["numa"], record["scales"]) == ("AMXINT8", 2, "amax")
    assert (record["hidden_size"], record["moe_intermediate_size"]) == (HIDDEN, INTERMEDIATE)
    assert (record["source"], record["kconvert"]) == ("tiny", kconvert.__version__)
    shards = sorted(root.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safetensors.safe_open(shard, "pt") as file:
            metadata = file.metadata()
        assert metadata == {"format": "pt", **{key: str(value) for key, value in record.items()}}


def test_kt_config_json_says_what_the_kt_command_shows(two: Path, source: Path) -> None:
    config = json.loads((two / "config.json").read_text())
    assert config.pop("amx_quantization") == {"converted": True, "method": "int4", "numa_count": 2}
    expected = json.loads((source / "config.json").read_text())
    del expected["quantization_config"]  # not how these weights are quantised
    assert config == expected


@pytest.mark.parametrize("form", ["safetensors", "kt"])
def test_inspect_says_what_it_is_and_how_to_launch_it(source: Path, tmp_path: Path, form: str) -> None:
    root = repack(source, tmp_path / "out", "AMXINT8", 4, form=form)
    result = run("inspect", root, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["method"], facts["numa"], facts["format"], facts["source"]) == ("AMXINT8", 4, form, "tiny")
    assert (facts["hidden_size"], facts["moe_intermediate_size"]) == (HIDDEN, INTERMEDIATE)
    assert facts["layers"] == {"1": 3, "2": 3}
    command = run("inspect", root).stdout.splitlines()[-1]
    assert command == f"launch: {facts['launch']}"
    assert f"--kt-weight-path {root} --kt-method AMXINT8 --kt-threadpool-count 4" in command


@pytest.mark.parametrize("left", ["nothing", "the headers"])
def test_a_directory_without_kconvert_json_is_known_by_its_tensors(
    two: Path, tmp_path: Path, left: str, raw: Any
) -> None:
    """As kt-kernel's converter leaves it."""
    for path in two.glob("*.safetensors"):
        if left == "nothing":
            raw.write_file(tmp_path / path.name, raw.read_file(path))
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    facts = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert (facts["method"], facts["numa"], facts["hidden_size"]) == ("AMXINT4", 2, HIDDEN)
    assert facts["source"] == (None if left == "nothing" else "tiny")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("blk.2.ffn_up_exps.1.numa.1.scale"), "blk.2.ffn_up_exps.1"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "up_exps.1." in name], "layer 1"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "numa.1." in name],
            "numa 2, but the tensors are 1",
        ),
    ],
)
def test_a_directory_that_lacks_tensors_is_refused(
    two: Path, tmp_path: Path, raw: Any, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    checkpoint = raw.load(two)
    for tensors in checkpoint.files.values():
        change(tensors)
    checkpoint.save(tmp_path)
    (tmp_path / "kconvert.json").write_bytes((two / "kconvert.json").read_bytes())
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


@pytest.mark.parametrize("text", [b"", b"[1, ", b"[" * 100_000, b"[]", b"\xff\xff"])
def test_a_record_that_is_no_json_object_is_one_sentence(source: Path, tmp_path: Path, text: bytes) -> None:
    root = repack(source, tmp_path / "out", "AMXINT8", 1)
    (root / "kconvert.json").write_bytes(text)
    with pytest.raises(kconvert.KconvertError, match=r"kconvert.json is not .*; pack it anew"):
        open_amx(root)


@pytest.mark.parametrize("name", ["kconvert.json", "_layer_1", "_layer_1/_numa_0"])
def test_links_that_lead_out_of_a_tree_of_kt_files_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    root = repack(source, tmp_path / "out", "AMXINT8", 1, form="kt")
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        kconvert.KconvertError, match=f"{name} is a symbolic link to .*elsewhere, outside the checkpoint"
    ):
        open_amx(root)
    with kconvert.links_allowed():
        open_amx(root)


def test_amx_weights_beside_a_model_are_named_as_such(source: Path, tmp_path: Path) -> None:
    root = repack(source, tmp_path / "out", "AMXINT8", 1)
    (shard,) = root.glob("*.safetensors")
    shard.rename(root / "amx.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, root / "model.safetensors")
    (root / "model.safetensors.index.json").unlink()
    with pytest.raises(
        kconvert.KconvertError, match=r"AMX weights lie in amx.safetensors and others in model.safetensors"
    ):
        open_amx(root)
