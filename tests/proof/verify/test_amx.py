"""`kconvert verify` of AMX weights: sound ones pass, and planted faults are found with the name of the tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

import kconvert
from kconvert import Recipe, convert
from kconvert.formats.reference import amx as reference
from kconvert.models.amx import open_amx
from kconvert.proof.parity.compare import DEFAULT_LIMITS
from kconvert.proof.parity.metrics import measure
from kconvert.targets.amx import AmxRecipe, plan_repack, plan_resplit

Verify = Callable[..., Result]
UP = "blk.2.ffn_up_exps.1.numa.0"
DOWN = "blk.1.ffn_down_exps.0.numa.1"


@pytest.fixture(scope="module")
def source(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tmp_path_factory.mktemp("amx") / "source", moe_intermediate=512, experts=2)


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    """`source` as AMXINT4 for two NUMA nodes, with the rest."""
    recipe = AmxRecipe("AMXINT4", 2, with_rest=True)
    convert(plan_repack(kconvert.inspect(source), recipe), source.parent / "packed")
    return source.parent / "packed"


@pytest.mark.parametrize("form", ["safetensors", "kt"])
@pytest.mark.parametrize("scales", ["amax", "mse"])
@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_sound_weights_are_verified_and_the_loss_is_told(
    source: Path, tmp_path: Path, run_verify: Verify, method: str, scales: str, form: str
) -> None:
    convert(plan_repack(kconvert.inspect(source), AmxRecipe(method, 4, scales, form)), tmp_path / "out")
    result = run_verify(source, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["weights"], report["skipped"]) == (12, 0)
    assert {(row["role"], row["format"]) for row in report["roles"]} == {
        (f"expert.{projection}", method.lower()) for projection in ("gate", "up", "down")
    }
    assert any(f"by {scales}" in note for note in report["notes"])
    assert 0 < report["totals"]["frobenius"] < (0.5 if method == "AMXINT4" else 0.03)


def test_shards_that_were_cut_further_are_verified(
    source: Path, packed: Path, tmp_path: Path, run_verify: Verify
) -> None:
    convert(plan_resplit(open_amx(packed), 4, "safetensors"), tmp_path / "out")
    result = run_verify(source, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(
        "verified: 12 weights equal the reference encoding (by the proof's own code, checked by the reference) of "
        "the source's values"
    )
    assert "relative Frobenius error" in result.stdout


def test_a_sample_says_how_much_it_skipped(source: Path, packed: Path, run_verify: Verify) -> None:
    report = json.loads(run_verify(source, packed, "--sample", 0.3, "--json").stdout)
    whole = json.loads(run_verify(source, packed, "--json").stdout)
    assert (whole["weights"], whole["skipped"]) == (12, 0)
    assert 0 < report["weights"] < 12
    assert report["weights"] + report["tensors"] + report["skipped"] == 12 + whole["tensors"]


@pytest.fixture
def check(source: Path, packed: Path, tmp_path: Path, raw: Any, run_verify: Verify) -> Callable[..., str]:
    """`check(change)`: after `change(checkpoint)` the verification fails, with the line that is returned."""

    def run(change: Callable[[Any], None]) -> str:
        checkpoint = raw.load(packed)
        change(checkpoint)
        checkpoint.save(tmp_path)
        shutil.copy(packed / "kconvert.json", tmp_path)
        result = run_verify(source, tmp_path)
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        return str(result.stderr)

    return run


def flip(tensor: Any) -> None:
    tensor.data = tensor.data[:1000] + bytes([tensor.data[1000] ^ 0x10]) + tensor.data[1001:]


def double(tensor: Any) -> None:
    (scale,) = struct.unpack_from("<f", tensor.data, 400)
    tensor.data = tensor.data[:400] + struct.pack("<f", 2 * scale) + tensor.data[404:]


@pytest.mark.parametrize(
    ("name", "change"),
    [(f"{UP}.weight", flip), (f"{DOWN}.weight", flip), (f"{UP}.scale", double), (f"{DOWN}.scale", double)],
)
def test_one_changed_code_or_scale_is_found(
    check: Callable[..., str], name: str, change: Callable[[Any], None]
) -> None:
    assert name in check(lambda checkpoint: change(checkpoint[name]))


def test_scales_by_another_rule_than_the_record_says_are_found(
    source: Path, packed: Path, tmp_path: Path, raw: Any, run_verify: Verify
) -> None:
    root = raw.load(packed).save(tmp_path / "packed")
    record = json.loads((packed / "kconvert.json").read_text())
    (root / "kconvert.json").write_text(json.dumps({**record, "scales": "amax"}))
    result = run_verify(source, root)
    assert result.exit_code == 1
    assert "differs from the reference encoding" in result.stderr


@pytest.mark.parametrize("scales", ["amax", "mse"])
@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_the_usual_limits_are_kept_by_gaussian_and_by_heavy_tailed_weights(
    source: Path, tmp_path: Path, raw: Any, run_verify: Verify, method: str, scales: str
) -> None:
    convert(kconvert.plan(source, Recipe("bf16")), tmp_path / "bf16")
    checkpoint = raw.load(tmp_path / "bf16")
    generator = np.random.default_rng(0)
    for name in [name for name in checkpoint if ".experts." in name]:
        tensor = checkpoint[name]
        values = generator.standard_t(8, tensor.shape) if "up" in name else generator.standard_normal(tensor.shape)
        tensor.data = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().tobytes()
    checkpoint.save()
    convert(plan_repack(kconvert.inspect(tmp_path / "bf16"), AmxRecipe(method, 2, scales)), tmp_path / "out")
    result = run_verify(tmp_path / "bf16", tmp_path / "out", "--close")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_usual_limits_are_kept_by_long_rows(bits: int, mse: bool) -> None:
    weight = torch.randn(128, 7168, generator=torch.Generator().manual_seed(0)).bfloat16()
    errors, _ = measure(weight, reference.decode(*reference.encode(weight, bits, mse), 7168, bits))
    assert DEFAULT_LIMITS[f"amxint{bits}"].missed(errors) is None


@pytest.mark.parametrize(("limit", "code"), [("sqnr=5", 0), ("sqnr=60", 1)])
def test_the_user_s_limits_decide_on_amx_weights(
    source: Path, packed: Path, run_verify: Verify, limit: str, code: int
) -> None:
    result = run_verify(source, packed, "--fail-under", limit)
    assert result.exit_code == code, result.stderr
    assert code == 0 or ("(amxint4): its SQNR" in result.stderr and "furthest off at [" in result.stderr)


@pytest.mark.parametrize("change", [flip, double])
def test_a_fault_that_limits_let_pass_is_found_without_them(
    source: Path, packed: Path, tmp_path: Path, raw: Any, run_verify: Verify, change: Callable[[Any], None]
) -> None:
    checkpoint = raw.load(packed)
    change(checkpoint[f"{DOWN}.{'weight' if change is flip else 'scale'}"])
    checkpoint.save(tmp_path / "out")
    assert (
        run_verify(source, tmp_path / "out", "--fail-under", "sqnr=5", "--fail-over", "max_relative=9").exit_code == 0
    )
    assert run_verify(source, tmp_path / "out").exit_code == 1


@pytest.mark.parametrize("options", [("--logits",), ("--include", "*.layers.1.*"), ("--exclude", "*.layers.1.*")])
def test_what_amx_weights_do_not_have_is_refused(
    source: Path, packed: Path, run_verify: Verify, options: tuple[str, ...]
) -> None:
    result = run_verify(source, packed, *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("blk.1.ffn_gate_exps.0.numa.0.weight", "blk.1.ffn_up_exps.0.numa.0.weight"),
        ("blk.1.ffn_up_exps.0.numa.0.weight", "blk.1.ffn_up_exps.1.numa.0.weight"),
        ("blk.1.ffn_down_exps.0.numa.0.weight", "blk.1.ffn_down_exps.0.numa.1.weight"),
    ],
    ids=["gate and up", "experts", "NUMA shards"],
)
def test_swapped_tensors_are_found(check: Callable[..., str], one: str, two: str) -> None:
    def swap(checkpoint: Any) -> None:
        a, b = checkpoint[one], checkpoint[two]
        a.data, b.data = b.data, a.data

    line = check(swap)
    assert one in line or two in line


@pytest.mark.parametrize("name", ["blk.0.input_layernorm.weight", "lm_head.weight"])
@pytest.mark.parametrize("change", ["flipped", "missing"])
def test_faults_of_the_rest_are_found(check: Callable[..., str], name: str, change: str) -> None:
    def damage(checkpoint: Any) -> None:
        if change == "missing":
            checkpoint.pop(name)
        else:
            data = checkpoint[name].data
            checkpoint[name].data = data[:-1] + bytes([data[-1] ^ 1])

    assert name in check(damage)


def test_weights_of_another_model_are_refused(
    sample: Callable[..., Path], packed: Path, tmp_path: Path, run_verify: Verify
) -> None:
    other = sample(tmp_path / "other", moe_intermediate=512, experts=3)
    result = run_verify(other, packed)
    assert result.exit_code == 1
    assert "ffn_" in result.stderr


def test_a_missing_weight_is_found(check: Callable[..., str]) -> None:
    def remove(checkpoint: Any) -> None:
        for name in [name for name in checkpoint if name.startswith("blk.2.ffn_down_exps.1")]:
            checkpoint.pop(name)

    assert "layer 2" in check(remove)


@pytest.mark.parametrize("scales", ["amax", "mse"])
def test_weights_that_do_not_say_how_they_were_scaled_are_verified(
    source: Path, tmp_path: Path, raw: Any, run_verify: Verify, scales: str
) -> None:
    """As kt-kernel's converter leaves them."""
    convert(plan_repack(kconvert.inspect(source), AmxRecipe("AMXINT8", 1, scales)), tmp_path / "out")
    result = run_verify(source, raw.load(tmp_path / "out").save(tmp_path / "bare"))
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "bare" / "kconvert.json").exists()


def test_verifying_never_uses_the_kernels_that_packed(
    source: Path, packed: Path, loaded_by_verify: Callable[[Path, Path], str]
) -> None:
    assert loaded_by_verify(source, packed) == "{'kconvert.proof.parity.quick.loops'}\n"
