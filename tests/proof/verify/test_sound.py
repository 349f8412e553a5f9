"""Conversions that are what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from kconvert import Recipe, convert, plan, verify


def test_a_good_conversion_is_verified(int4: Path, bf16: Path, run_verify: Callable[..., Result]) -> None:
    result = run_verify(int4, bf16)

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("verified: ")
    told = "the source's values, decompressed by the proof's own code and checked by compressed-tensors, bit for bit"
    assert f"weights equal {told}" in result.stdout
    assert "not looked at" not in result.stdout
    assert result.stderr == ""


def test_a_sample_is_verified_and_says_how_much_it_skipped(
    int4: Path, bf16: Path, run_verify: Callable[..., Result]
) -> None:
    result = run_verify(int4, bf16, "--sample", 0.01, "--json")

    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    whole = verify(int4, bf16)
    assert report["skipped"] > 0
    assert report["weights"] > 0
    assert report["weights"] + report["tensors"] + report["skipped"] == whole.weights + whole.tensors
    assert whole.skipped == 0


def test_a_scattered_source_is_verified(scattered: Path, bf16: Path) -> None:
    assert verify(scattered, bf16).skipped == 0


def test_the_report_counts_every_weight_and_tensor(int4: Path, bf16: Path, raw: Any) -> None:
    report = verify(int4, bf16)

    assert report.weights + report.tensors == len(list(raw.load(bf16)))
    assert report.side_files > 5
    assert report.dropped == ()


def test_a_conversion_of_some_weights_is_verified_with_the_same_selection(int4: Path, tmp_path: Path) -> None:
    selection = ("*.experts.3.*",)
    convert(plan(int4, Recipe("bf16", exclude=selection)), tmp_path / "out")

    assert verify(int4, tmp_path / "out", exclude=selection).weights > 0


def test_verifying_changes_nothing(
    int4: Path, bf16_copy: Path, tree: Callable[[Path], dict[str, bytes]], run_verify: Callable[..., Result]
) -> None:
    before = tree(bf16_copy)

    assert run_verify(int4, bf16_copy, "-q").exit_code == 0

    assert tree(bf16_copy) == before
    assert not (bf16_copy / ".kconvert").exists()


def test_verifying_never_uses_the_kernels_that_wrote_the_output(
    int4: Path, bf16: Path, loaded_by_verify: Callable[[Path, Path], str]
) -> None:
    assert loaded_by_verify(int4, bf16) == "{'kconvert.proof.parity.quick.loops'}\n"


@pytest.mark.parametrize("extra", [".gitattributes", "notes.txt"])
def test_a_file_of_the_user_s_own_in_the_output_does_no_harm(int4: Path, bf16_copy: Path, extra: str) -> None:
    (bf16_copy / extra).write_text("mine")

    assert verify(int4, bf16_copy).weights > 0


def test_other_shards_with_the_same_tensors_are_verified(int4: Path, bf16: Path, tmp_path: Path, raw: Any) -> None:
    """Whoever wrote the output: the values count, not the files."""
    shutil.copytree(bf16, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors*", ".kconvert"))
    checkpoint = raw.load(bf16)
    for name in list(checkpoint)[::3]:
        checkpoint.move(name, "other.safetensors")
    checkpoint.save(tmp_path / "out")

    assert verify(int4, tmp_path / "out").skipped == 0


def test_a_single_file_without_an_index_is_verified(int4: Path, tmp_path: Path) -> None:
    """As other tools save small models."""
    convert(plan(int4, Recipe("bf16")), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    shutil.rmtree(tmp_path / "out" / ".kconvert")

    assert verify(int4, tmp_path / "out").skipped == 0


def test_weights_without_elements_are_verified(
    int4: Path, tmp_path: Path, raw: Any, run_verify: Callable[..., Result]
) -> None:
    """As transformers saves them for a model without shared experts."""
    checkpoint = raw.load(int4)
    checkpoint.config["n_shared_experts"] = 0
    for name in (name for name in checkpoint if "shared_experts" in name):
        tensor = checkpoint[name]
        tensor.shape[1 if "down_proj" in name else 0], tensor.data = 0, b""
    checkpoint.save(tmp_path / "source")
    convert(plan(tmp_path / "source", Recipe("bf16")), tmp_path / "out")

    result = run_verify(tmp_path / "source", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
