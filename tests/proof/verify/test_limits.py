"""Pairs that need not be equal to the bit: limits by format, limits of the user, and outputs made by other code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from kconvert import Recipe, convert, inspect, plan
from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.reference import amx, fp8, int8, mx, packed
from kconvert.proof.parity.compare import DEFAULT_LIMITS
from kconvert.proof.parity.metrics import measure
from kconvert.targets.planner import PLANNERS
from kconvert.targets.registry import TARGETS

Verify = Callable[..., Result]
DATA = Path(__file__).parents[2] / "data"
GATE = "model.layers.1.mlp.experts.2.gate_proj"


@pytest.fixture
def foreign(fp8_copy: Path, bf16: Path, raw: Any) -> Path:
    """`fp8` as other code rounds it: quotients in BF16, which compressed-tensors' own FP8_BLOCK rounds twice."""
    checkpoint, source = raw.load(fp8_copy), raw.load(bf16)
    for name in [name for name in checkpoint if name.endswith("weight_scale_inv")]:
        codes = checkpoint[name.removesuffix("_scale_inv")]
        rows, cols = codes.shape
        scale = torch.frombuffer(bytearray(checkpoint[name].data), dtype=torch.float32).view(checkpoint[name].shape)
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
        values = torch.frombuffer(bytearray(source[name.removesuffix("_scale_inv")].data), dtype=torch.bfloat16)
        quotients = values.view(rows, cols) / spread.bfloat16()
        codes.data = bytes(quotients.to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    checkpoint.save()
    (fp8_copy / "LICENSE").write_text("another")
    return fp8_copy


def test_other_code_s_rounding_is_not_ours_but_close(int4: Path, foreign: Path, run_verify: Verify) -> None:
    (foreign / "LICENSE").write_bytes((int4 / "LICENSE").read_bytes())
    exact, close = run_verify(int4, foreign), run_verify(int4, foreign, "--close")
    assert exact.exit_code == 1
    assert "differs from the reference encoding" in exact.stderr
    assert "--close" in exact.stderr
    assert close.exit_code == 0, close.stderr
    assert "within limits" in close.stdout
    assert "bit for bit" not in close.stdout


def test_side_files_that_differ_are_a_note_on_another_conversion(
    int4: Path, foreign: Path, run_verify: Verify, tmp_path: Path
) -> None:
    assert "LICENSE" in run_verify(int4, foreign).stderr
    assert run_verify(int4, foreign, "--close", "--report", tmp_path / "report.json").exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (note,) = report["notes"]
    assert "LICENSE" in note
    assert report["standard"] == "limits"
    assert report["limits"]["fp8 block 128x128"]["floors"] == {"sqnr": 27.0}


def test_two_conversions_of_one_model_are_compared_with_each_other(
    int4: Path, fp8: Path, tmp_path: Path, run_verify: Verify
) -> None:
    convert(plan(int4, Recipe("mxfp4")), tmp_path / "mxfp4")
    assert run_verify(fp8, tmp_path / "mxfp4", "--close").exit_code == 0
    assert run_verify(tmp_path / "mxfp4", fp8, "--close").exit_code == 1


@pytest.mark.parametrize(
    ("option", "limit", "code"),
    [
        ("--fail-under", "sqnr=20", 0),
        ("--fail-under", "sqnr=40", 1),
        ("--fail-under", "cosine=0.9999999", 1),
        ("--fail-over", "frobenius=0.04", 0),
        ("--fail-over", "frobenius=0.001", 1),
        ("--fail-over", "max_abs=1e-9", 1),
    ],
)
def test_the_user_s_limits_decide(
    int4: Path, fp8: Path, run_verify: Verify, option: str, limit: str, code: int
) -> None:
    result = run_verify(int4, fp8, option, limit)
    assert result.exit_code == code, result.stderr
    assert code == 0 or ("limit of" in result.stderr and "furthest off at [" in result.stderr)
    assert "first rows" not in result.stdout  # limits are on all values


@pytest.mark.parametrize("limit", ["sqnr", "sqnr=", "sqnr=much", "colour=3", "max_abs=1"])
def test_a_limit_that_is_none_is_wrong_usage(int4: Path, fp8: Path, run_verify: Verify, limit: str) -> None:
    result = run_verify(int4, fp8, "--fail-under", limit)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--fail-under" in result.stderr


@pytest.mark.parametrize("target", [to for to in TARGETS if to not in ("bf16", "int4", *PLANNERS)])
def test_every_encoding_keeps_its_usual_limits(int4: Path, tmp_path: Path, run_verify: Verify, target: str) -> None:
    for scales in ("amax", "mse") if target.startswith("mx") else ("amax",):
        convert(plan(int4, Recipe(target, scales=scales)), tmp_path / scales)
        result = run_verify(int4, tmp_path / scales, "--close")
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("convention", ["kimi", "compressed-tensors"])
@pytest.mark.parametrize(("group", "scales"), [(32, "amax"), (128, "amax"), (128, "mse")])
def test_gaussian_weights_in_int4_keep_the_usual_limits(
    bf16_copy: Path, tmp_path: Path, run_verify: Verify, raw: Any, convention: str, group: int, scales: str
) -> None:
    checkpoint = raw.load(bf16_copy)
    for number, name in enumerate(name for name in checkpoint if ".experts." in name):
        tensor = checkpoint[name]
        weight = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)).bfloat16()
        tensor.data = weight.view(torch.int16).numpy().tobytes()
    checkpoint.save()
    recipe = Recipe("int4", convention=convention, group_size=group, scales=scales)
    convert(plan(bf16_copy, recipe), tmp_path / "int4")

    assert run_verify(bf16_copy, tmp_path / "int4").exit_code == 0
    assert run_verify(bf16_copy, tmp_path / "int4", "--close").exit_code == 0


def again(weight: torch.Tensor, mse: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of a weight in every format that the references write."""
    yield "f16", weight.half()
    for block in ((128, 128), (1, weight.shape[1])):
        yield "fp8", fp8.decode(*fp8.encode(weight, block, mse=mse), block)
    yield "int8", int8.decode(*int8.encode(weight))
    for bits in (4, 8):
        yield f"mxfp{bits}", mx.decode(*mx.encode(weight, bits, mse))
        codes, scale = amx.codes_and_scale(weight, bits, mse)
        yield f"amxint{bits}", codes * (scale * (16 if bits == 4 else 1)).unsqueeze(1)
    for rule in CONVENTIONS.values():
        encode = packed.encode_mse if mse else packed.encode
        yield "int4", packed.decode(*encode(weight, 32, rule), weight.shape[1])


@pytest.mark.parametrize("mse", [False, True], ids=["amax", "mse"])
@pytest.mark.parametrize("name", ["kimi_k26_slice", "qwen_rtn_slice"])
def test_real_weights_in_every_encoding_keep_the_usual_limits(name: str, mse: bool) -> None:
    """Qwen's has dead rows of 2^-124, which the scale of a block, FP16 and AMX make zero."""
    weight = load_file(DATA / f"{name}.safetensors")["weight"]
    for label, values in again(weight, mse):
        assert DEFAULT_LIMITS[label].missed(measure(weight, values)[0]) is None, label


def test_every_encoding_has_limits_of_its_own(int4: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        if target != "int4" and target not in PLANNERS:
            convert(plan(int4, Recipe(target)), tmp_path / target)
            labels = {weight.format.label for weight in inspect(tmp_path / target).weights}
            assert {label.split()[0] for label in labels} <= DEFAULT_LIMITS.keys()


def test_a_sample_of_a_damaged_output_names_what_it_did_not_look_at(
    int4: Path, fp8: Path, run_verify: Verify, tmp_path: Path
) -> None:
    assert run_verify(int4, fp8, "--sample", 0.1, "--report", tmp_path / "report.json").exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["skipped"] > 0
    assert len(report["results"]) == report["weights"]
