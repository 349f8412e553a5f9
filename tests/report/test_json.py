"""The JSON report: under its schema, with the figures that the checkpoints have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import Result
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

import kconvert
from kconvert.formats.conventions import COMPRESSED_TENSORS
from kconvert.formats.reference import packed as reference

GATE = "model.layers.1.mlp.experts.2.gate_proj"
Load = Callable[[str], Any]


def schema(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((resources.files("kconvert.report") / f"{name}.schema.json").read_text("utf-8"))
    return table


@pytest.mark.parametrize(("report", "name"), [("passed", "verify"), ("failed", "verify"), ("inspect", "inspect")])
def test_a_report_is_what_its_schema_says(load: Load, report: str, name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(name))
    jsonschema.Draft202012Validator(schema(name)).validate(load(report))


def test_what_is_printed_is_under_the_schema_too(int4: Path, fp8: Path, run: Callable[..., Result]) -> None:
    said = json.loads(run("verify", int4, fp8, "--json").stdout)
    jsonschema.Draft202012Validator(schema("verify")).validate(said)
    assert "results" not in said


def test_the_schema_admits_nothing_that_it_does_not_describe(load: Load) -> None:
    report = {**load("passed"), "surprise": 1}
    assert not jsonschema.Draft202012Validator(schema("verify")).is_valid(report)


def test_the_errors_of_a_weight_are_those_of_its_values(load: Load, int4: Path, fp8: Path, raw: Any) -> None:
    """Decoded here by compressed-tensors and torch; metrics in numpy."""
    source, output = raw.load(int4), raw.load(fp8)
    state = {
        "weight_packed": torch.frombuffer(bytearray(source[f"{GATE}.weight_packed"].data), dtype=torch.int32).view(
            128, 32
        ),
        "weight_scale": torch.frombuffer(bytearray(source[f"{GATE}.weight_scale"].data), dtype=torch.bfloat16).view(
            128, 8
        ),
        "weight_shape": torch.tensor([128, 256]),
    }
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    a = PackedQuantizationCompressor.decompress(state, scheme)["weight"].double().numpy()
    codes = torch.frombuffer(bytearray(output[f"{GATE}.weight"].data), dtype=torch.float8_e4m3fn).view(128, 256)
    scale = torch.frombuffer(bytearray(output[f"{GATE}.weight_scale_inv"].data), dtype=torch.float32)
    b = (codes.float() * scale.repeat_interleave(128)).bfloat16().double().numpy()

    (found,) = (row for row in load("passed")["results"] if row["name"] == GATE)

    assert found["sqnr"] == pytest.approx(20 * math.log10(np.linalg.norm(a) / np.linalg.norm(b - a)))
    assert found["frobenius"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert found["max_abs"] == np.abs(b - a).max()
    assert found["cosine"] == pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
    assert found["different"] == np.count_nonzero(b != a)
    assert found["saturated"] == float((codes.float().abs() == 448).double().mean())
    assert found["unused"] == 253 - len(np.unique(codes.float().numpy() + 0.0))
    at = found["worst"]
    assert (a[at["row"], at["col"]], b[at["row"], at["col"]]) == (at["expected"], at["found"])


def test_the_groups_add_up(load: Load) -> None:
    report = load("passed")
    assert {row["judged_by"] for row in report["results"]} == {"values", "bytes"}
    for key in ("roles", "layers"):
        assert sum(row["weights"] for row in report[key]) == report["weights"] == len(report["results"])
        assert sum(row["different"] for row in report[key]) == report["totals"]["different"]
    assert len(report["experts"]) == 2 * 4
    expert = next(row for row in report["experts"] if (row["layer"], row["expert"]) == (1, 2))
    members = [row for row in report["results"] if (row["layer"], row["expert"]) == (1, 2)]
    assert (expert["weights"], expert["max_abs"]) == (3, max(row["max_abs"] for row in members))
    codes = next(row for row in report["roles"] if row["role"] == "expert.up")["codes"]
    assert sum(count for _, count in codes) == 8 * 128 * 256


def test_the_worst_are_ten_and_in_order(load: Load) -> None:
    report = load("passed")
    ranked = sorted((row for row in report["results"] if row["sqnr"] is not None), key=lambda row: row["sqnr"])
    assert [row["name"] for row in report["worst"]] == [row["name"] for row in ranked[:10]]
    for row in report["worst"]:
        place = row["col"] - row["first_col"]
        assert (row["source_values"][place], row["output_values"][place]) == (row["expected"], row["found"])


def test_a_failed_report_has_every_fault(load: Load) -> None:
    report = load("failed")
    assert report["verdict"] == "failed"
    assert len(report["faults"]) == 2
    assert any("model.layers.2.mlp.experts.0.up_proj' of the source is missing" in fault for fault in report["faults"])
    assert any(f"{GATE}.weight_scale_inv' differs" in fault for fault in report["faults"])
    assert [row["name"] for row in report["results"] if row["fault"]] == [GATE]
    assert report["worst"][0]["name"] == GATE


def test_a_report_says_where_everything_comes_from(load: Load, int4: Path, fp8: Path) -> None:
    report = load("passed")
    assert report["kconvert"] == kconvert.__version__
    assert report["source"]["name"] == int4.name
    values = "the source's values, decompressed by the proof's own code and checked by compressed-tensors"
    assert (
        report["reference"] == f"the reference encoding (by the proof's own code, checked by the reference) of {values}"
    )
    written = report["output"]["written_by"]
    assert (written["version"], written["from"]) == (kconvert.__version__, int4.name)
    assert "to='fp8'" in written["recipe"]
    assert written["command"] == "kconvert.convert"
    assert load("failed")["output"]["written_by"] is None


def test_an_inspect_report_says_whose_grid_the_codes_are_on(load: Load) -> None:
    report = load("inspect")
    assert {grid["role"]: grid["convention"] for grid in report["grids"]} == dict.fromkeys(
        ("expert.down", "expert.gate", "expert.up"), "kimi"
    )
    assert sum(row["bytes"] for row in report["sizes"]) == report["source"]["bytes"]


def test_the_grid_of_the_other_convention_is_told_as_well(
    int4_copy: Path, tmp_path: Path, raw: Any, run: Callable[..., Result]
) -> None:
    checkpoint = raw.load(int4_copy)
    for number, name in enumerate(name for name in checkpoint if name.endswith("up_proj.weight_packed")):
        weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(number)).bfloat16()
        packed, scale = reference.encode(weight, 32, COMPRESSED_TENSORS)
        checkpoint[name].data = packed.numpy().tobytes()
        checkpoint[name.replace("packed", "scale")].data = scale.view(torch.int16).numpy().tobytes()
    checkpoint.save()

    assert run("inspect", int4_copy, "--report", tmp_path / "report.json").exit_code == 0

    grids = json.loads((tmp_path / "report.json").read_text())["grids"]
    conventions = {grid["role"]: grid["convention"] for grid in grids}
    assert conventions == {"expert.down": "kimi", "expert.gate": "kimi", "expert.up": "compressed-tensors"}
