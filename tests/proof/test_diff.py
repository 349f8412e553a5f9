"""`kconvert diff`: which tensors differ in name, dtype, shape or value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kconvert.cli import main
from kconvert.proof.diff import diff

NORM = "model.layers.2.input_layernorm.weight"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight_packed"


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["diff", *map(str, arguments)], catch_exceptions=False)

    return run


def test_a_checkpoint_does_not_differ_from_itself(int4: Path, scattered: Path, run: Callable[..., Result]) -> None:
    for other in (int4, scattered):  # in other shards, too
        result = run(int4, other)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "0 changed" in result.stdout


def test_every_kind_of_change_is_told(int4: Path, int4_copy: Path, raw: Any, run: Callable[..., Result]) -> None:
    checkpoint = raw.load(int4_copy)
    changed = bytearray(checkpoint[GATE].data)
    changed[4] ^= 1
    changed[7] ^= 1
    changed[400] ^= 1
    checkpoint[GATE].data = bytes(changed)
    checkpoint.put("new", raw.Tensor("F32", [2], bytes(8)))
    checkpoint.pop("lm_head.weight")
    checkpoint["model.norm.weight"].dtype = "F16"
    checkpoint[NORM].shape = [2, 128]
    checkpoint.config["rope_theta"] = 1
    checkpoint.save()

    found = diff(int4, int4_copy)

    assert {change.name: change.kind for change in found.changes} == {
        GATE: "value",
        "new": "added",
        "lm_head.weight": "removed",
        "model.norm.weight": "dtype",
        NORM: "shape",
    }
    value = next(change for change in found.changes if change.kind == "value")
    assert (value.changed, value.elements) == (2, 128 * 32)
    assert found.config == ("rope_theta",)
    assert found.same == len(list(raw.load(int4))) - 4
    result = run(int4, int4_copy)
    assert result.exit_code == 1
    assert f"2 of {128 * 32:,} elements" in result.stdout
    assert "BF16 [256] -> F16 [256]" in result.stdout
    assert json.loads(run(int4, int4_copy, "--json").stdout)["config"] == ["rope_theta"]


def test_changes_are_listed_in_natural_order_and_as_many_as_wanted(
    int4: Path, bf16: Path, run: Callable[..., Result]
) -> None:
    result = run(int4, bf16, "--limit", 3)
    lines = result.stdout.splitlines()
    assert [" | " in line for line in lines[:4]] == [True, True, True, False]
    assert "more" in lines[3]
    assert "24 added, 72 removed" in lines[-1]
    assert len(run(int4, bf16, "--limit", 0).stdout.splitlines()) == 96 + 2


def test_headers_alone_read_no_values(int4: Path, int4_copy: Path, raw: Any, run: Callable[..., Result]) -> None:
    checkpoint = raw.load(int4_copy)
    checkpoint[GATE].data = bytes(len(checkpoint[GATE].data))
    checkpoint.save()
    assert run(int4, int4_copy, "--headers").exit_code == 0
    assert run(int4, int4_copy, "-q").exit_code == 1


def test_two_models_of_no_known_family_are_compared(tmp_path: Path, raw: Any) -> None:
    for name, value in (("a", b"\1\0"), ("b", b"\2\0")):
        raw.new(
            tmp_path / name, {"x.safetensors": {"t": raw.Tensor("BF16", [1], value), "e": raw.Tensor("F32", [0], b"")}}
        ).save()
    assert [change.name for change in diff(tmp_path / "a", tmp_path / "b").changes] == ["t"]


def test_what_is_no_checkpoint_is_bad_input(int4: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    result = run(int4, tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
