"""Reports on AMX weights: the same as on all others, with figures that numpy finds as well."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import Result

import kconvert
from kconvert import convert
from kconvert.targets.amx import AmxRecipe, plan_repack

Run = Callable[..., Result]
UP, DOWN = "blk.2.ffn_up_exps.1", "blk.1.ffn_down_exps.0"  # [512, 256] and [256, 512]
SOURCES = {UP: "model.layers.2.mlp.experts.1.up_proj", DOWN: "model.layers.1.mlp.experts.0.down_proj"}


@pytest.fixture(scope="module")
def source(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tmp_path_factory.mktemp("report-amx") / "source", moe_intermediate=512, experts=2)


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    """`source` as AMXINT4 for two NUMA nodes, with the rest."""
    recipe = AmxRecipe("AMXINT4", 2, with_rest=True)
    convert(plan_repack(kconvert.inspect(source), recipe), source.parent / "packed")
    return source.parent / "packed"


@pytest.fixture(scope="module")
def report(source: Path, packed: Path, run: Run) -> Any:
    path = source.parent / "report.json"
    result = run("verify", source, packed, "--report", path)
    assert result.exit_code == 0, result.stderr
    return json.loads(path.read_text())


def of_source(checkpoint: Any, name: str, shape: tuple[int, int]) -> Any:
    """Kimi's INT4 in groups of 32, lower nibbles first: code - 8 times the scale, in BF16."""
    data = np.frombuffer(checkpoint[f"{name}.weight_packed"].data, np.uint8)
    codes = np.stack([data & 15, data >> 4], -1).astype(np.int8).reshape(shape) - 8
    scale = torch.frombuffer(bytearray(checkpoint[f"{name}.weight_scale"].data), dtype=torch.bfloat16)
    values = torch.from_numpy(codes).bfloat16().view(-1, 32) * scale.view(-1, 1)
    return values.view(shape).double().numpy()


def of_shard(checkpoint: Any, name: str, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Codes and scales, unpacked by hand: 32 rows at a time, 64 bytes of each, words of two halves of 16 rows in turn."""
    rows, cols = shape
    data = np.frombuffer(checkpoint[f"{name}.weight"].data, np.uint8)
    lines = data.reshape(rows // 32, cols // 128, 2, 16, 16, 4).transpose(0, 2, 4, 1, 3, 5).reshape(rows, -1, 64)
    nibbles = np.concatenate([lines & 15, lines >> 4], -1).reshape(shape).astype(int)
    codes = np.where(nibbles > 7, nibbles - 16, nibbles)
    return codes, np.frombuffer(checkpoint[f"{name}.scale"].data, "<f4")


def of_output(checkpoint: Any, name: str, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Codes and values of both shards, which are of rows for up, and of columns for down."""
    axis = 1 if "down" in name else 0
    rows, cols = (size // 2 if n == axis else size for n, size in enumerate(shape))
    shards = [of_shard(checkpoint, f"{name}.numa.{n}", (rows, cols)) for n in range(2)]
    values = [(codes.astype(np.float32) * (scale * 16)[:, None]).astype(np.float64) for codes, scale in shards]
    return np.concatenate([codes for codes, _ in shards], axis), np.concatenate(values, axis)


def test_a_report_on_amx_weights_is_what_the_schema_says(report: Any) -> None:
    schema = json.loads((resources.files("kconvert.report") / "verify.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(report)
    assert report["verdict"] == "passed"
    assert (report["weights"], len(report["results"]), len(report["experts"])) == (12, 12, 4)
    assert {row["judged_by"] for row in report["results"]} == {"bytes"}
    assert report["tensors"] > 0


@pytest.mark.parametrize(("name", "shape"), [(UP, (512, 256)), (DOWN, (256, 512))])
def test_the_errors_of_an_amx_weight_are_those_of_its_values(
    report: Any, source: Path, packed: Path, raw: Any, name: str, shape: tuple[int, int]
) -> None:
    a = of_source(raw.load(source), SOURCES[name], shape)
    codes, b = of_output(raw.load(packed), name, shape)

    (found,) = (row for row in report["results"] if row["name"] == name)

    assert found["sqnr"] == pytest.approx(20 * math.log10(np.linalg.norm(a) / np.linalg.norm(b - a)))
    assert found["frobenius"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert found["cosine"] == pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
    assert found["max_abs"] == np.abs(b - a).max()
    assert found["different"] == np.count_nonzero(b != a)
    assert found["saturated"] == np.mean(np.abs(codes) == 7)
    assert found["unused"] == 16 - len(np.unique(codes))
    at = found["worst"]
    assert (a[at["row"], at["col"]], b[at["row"], at["col"]]) == (at["expected"], at["found"])


def test_the_histograms_count_every_code_and_scale(report: Any, packed: Path, raw: Any) -> None:
    (found,) = (row for row in report["roles"] if row["role"] == "expert.down")
    checkpoint = raw.load(packed)
    names = [f"blk.{layer}.ffn_down_exps.{expert}" for layer in (1, 2) for expert in range(2)]
    codes = np.concatenate([of_output(checkpoint, name, (256, 512))[0].ravel() for name in names])
    assert dict(found["codes"]) == {value: int((codes == value).sum()) for value in range(-8, 8)}
    assert sum(count for _, count in found["scales"]) == 4 * 256 * 2


def test_the_worst_amx_weights_are_shown_with_the_values_of_both_sides(report: Any) -> None:
    assert len(report["worst"]) == 10
    for row in report["worst"]:
        place = row["col"] - row["first_col"]
        assert (row["source_values"][place], row["output_values"][place]) == (row["expected"], row["found"])


def test_every_fault_of_amx_weights_is_in_the_report(
    source: Path, packed: Path, tmp_path: Path, raw: Any, run: Run
) -> None:
    """A flipped bit of a nibble, a doubled scale, and a changed tensor of the rest."""
    checkpoint = raw.load(packed)
    codes, scales = checkpoint[f"{UP}.numa.1.weight"], checkpoint[f"{DOWN}.numa.1.scale"]
    codes.data = codes.data[:1000] + bytes([codes.data[1000] ^ 0x10]) + codes.data[1001:]
    (scale,) = struct.unpack_from("<f", scales.data, 400)
    scales.data = scales.data[:400] + struct.pack("<f", 2 * scale) + scales.data[404:]
    norm = checkpoint["blk.0.input_layernorm.weight"]
    norm.data = bytes([norm.data[0] ^ 1]) + norm.data[1:]
    root = checkpoint.save(tmp_path / "damaged")

    result = run("verify", source, root, "--report", tmp_path / "report.json")

    assert result.exit_code == 1
    faults = "\n".join(json.loads((tmp_path / "report.json").read_text())["faults"])
    assert len(faults.splitlines()) == 3
    assert f"tensor '{UP}.numa.1.weight' differs from the reference encoding at element 1000" in faults
    assert f"tensor '{DOWN}.numa.1.scale' differs from the reference encoding at element 100" in faults
    assert "tensor 'blk.0.input_layernorm.weight' differs from the source's at element 0" in faults


def test_a_page_on_amx_weights_names_them(source: Path, packed: Path, tmp_path: Path, run: Run) -> None:
    assert run("verify", source, packed, "--report", tmp_path / "report.html").exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "Codes, amxint4" in page
    assert "blk.2.ffn_up_exps.1" in page
