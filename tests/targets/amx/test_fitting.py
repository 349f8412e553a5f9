"""Which models and numbers of NUMA nodes can be packed, and with which scales by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from amx_packing import Tree, load, repack, run

import kconvert
from kconvert import KconvertError, convert
from kconvert.formats.reference import amx as reference
from kconvert.models.catalogue import load_manifest
from kconvert.proof.parity.oracle import independent_values
from kconvert.targets.amx import possible_numa
from kconvert.targets.sample import SampleRecipe, plan_synthetic


@pytest.mark.parametrize(("method", "scales"), [("AMXINT4", "mse"), ("AMXINT8", "amax")])
def test_the_default_scales_are_the_better_ones(
    source: Path, tmp_path: Path, tree: Tree, method: str, scales: str
) -> None:
    default = repack(source, tmp_path / "default", method, 1)
    assert tree(default) == tree(repack(source, tmp_path / "named", method, 1, scales=scales))


ROLES = {
    "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    "kimi-linear": (
        "block_sparse_moe.experts.{}.w1",
        "block_sparse_moe.experts.{}.w3",
        "block_sparse_moe.experts.{}.w2",
    ),
    **dict.fromkeys(
        ("qwen3-moe", "glm-4-moe", "deepseek-v3", "kimi-k2-instruct", "kimi-k2.5"),
        ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    ),
}


@pytest.mark.parametrize("family", ROLES)
def test_gate_up_and_down_are_found_by_role_in_every_family(family: str, tmp_path: Path) -> None:
    sizes = {"layers": 3, "dense_layers": 1, "experts": 2, "hidden": 256, "intermediate": 256, "moe_intermediate": 128}
    sizes |= {"vocab": 256, "heads": 2, "q_rank": 64, "kv_rank": 32}
    sizes = {symbol: size for symbol, size in sizes.items() if symbol in load_manifest(family).dims}
    convert(plan_synthetic(SampleRecipe(family, sizes)), tmp_path / "sample")
    packed = load(repack(tmp_path / "sample", tmp_path / "out", "AMXINT8", 1))
    model = kconvert.inspect(tmp_path / "sample")
    for projection, pattern in zip(("gate", "up", "down"), ROLES[family], strict=True):
        (weight,) = (weight for weight in model.weights if weight.name.endswith(f"layers.2.{pattern.format(1)}"))
        with model.checkpoint.reader() as reader:
            values = independent_values(weight, reader, 0, weight.rows)
        data, scale = reference.encode(values, 8)
        assert torch.equal(packed[f"blk.2.ffn_{projection}_exps.1.numa.0.weight"], data)
        assert torch.equal(packed[f"blk.2.ffn_{projection}_exps.1.numa.0.scale"], scale)


def test_the_layers_behind_the_last_stay_out(tmp_path: Path) -> None:
    """DeepSeek-V3's MTP layer, which KTransformers does not serve."""
    sizes = {"layers": 2, "dense_layers": 1, "experts": 2, "hidden": 256, "intermediate": 256, "moe_intermediate": 128}
    sizes |= {"vocab": 256, "heads": 2, "q_rank": 64, "kv_rank": 32, "mtp": 1}
    convert(plan_synthetic(SampleRecipe("deepseek-v3", sizes)), tmp_path / "sample")
    names = load(tmp_path / "sample").keys()
    assert any(name.startswith("model.layers.2.mlp.experts.") for name in names)
    packed = load(repack(tmp_path / "sample", tmp_path / "out", "AMXINT4", 1))
    assert {name.split(".")[1] for name in packed} == {"1"}


@pytest.mark.parametrize(
    ("method", "numa", "words"),
    [
        ("AMXINT4", 3, ["128 x 3", "512", "256", "AMXINT4 with --numa 1, 2, 4", "AMXINT8 with --numa 1, 2, 4, 8"]),
        ("AMXINT4", 8, ["AMXINT4 with --numa 1, 2, 4", "AMXINT8 with --numa 1, 2, 4, 8"]),
        ("AMXINT8", 16, ["64 x 16", "AMXINT8 with --numa 1, 2, 4, 8"]),
    ],
)
def test_a_number_of_nodes_that_does_not_fit_is_refused_with_those_that_do(
    source: Path, tmp_path: Path, method: str, numa: int, words: list[str]
) -> None:
    result = run("repack-amx", source, tmp_path / "out", "--method", method, "--numa", numa)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert [word for word in words if word not in result.stderr] == []
    assert not (tmp_path / "out").exists()


def test_kimi_k2_allows_the_numbers_of_nodes_that_kt_kernel_does() -> None:
    assert possible_numa(4, 7168, 2048) == [1, 2, 4, 8, 16]
    assert possible_numa(8, 7168, 2048) == [1, 2, 4, 8, 16, 32]


def test_a_model_without_routed_experts_is_refused(raw: Any, tmp_path: Path) -> None:
    checkpoint = raw.new(tmp_path / "dense", config={"model_type": "unheard-of"})
    checkpoint.files["model.safetensors"] = {"a.weight": raw.Tensor("BF16", [128, 128], bytes(2 * 128 * 128))}
    checkpoint.save()
    with pytest.raises(KconvertError, match="routed experts"):
        repack(tmp_path / "dense", tmp_path / "out", "AMXINT4", 1)


def test_experts_without_a_gate_matrix_of_their_own_are_refused(tmp_path: Path) -> None:
    """gpt-oss, whose kernel KTransformers' AMX backends do not have."""
    sizes = {"layers": 1, "experts": 2, "hidden": 256, "moe_intermediate": 256, "vocab": 256, "heads": 4}
    convert(plan_synthetic(SampleRecipe("gpt-oss", sizes)), tmp_path / "sample")
    with pytest.raises(KconvertError, match="gpt-oss are not supported"):
        repack(tmp_path / "sample", tmp_path / "out", "AMXINT4", 1)


def test_a_kt_tree_with_the_rest_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KconvertError, match="with-rest"):
        repack(source, tmp_path / "out", "AMXINT4", 1, form="kt", with_rest=True)


def test_a_kimi_int4_source_is_told_of_rawint4_and_of_the_loss(source: Path, dense: Path, tmp_path: Path) -> None:
    options = ("--method", "AMXINT4", "--numa", 1, "--dry-run")
    told = run("repack-amx", source, tmp_path / "out", *options).stdout
    assert len([line for line in told.splitlines() if "RAWINT4" in line]) == 1
    assert len([line for line in told.splitlines() if "lossy re-quantisation" in line]) == 1
    assert "RAWINT4" not in run("repack-amx", dense, tmp_path / "out", *options).stdout


def test_plan_and_report_show_the_errors_of_both_scales(source: Path, tmp_path: Path) -> None:
    command = ("repack-amx", source, tmp_path / "out", "--method", "AMXINT4", "--numa", 2, "--json")
    planned, done = (json.loads(run(*command, *extra).stdout) for extra in (["--dry-run"], []))
    assert planned["sqnr_db"] == done["sqnr_db"]
    errors = planned["relative_frobenius"]["amxint4"]
    assert 0.05 < errors["mse"] < errors["amax"] < 0.5
    assert done["launch"].endswith(f"--kt-weight-path {tmp_path / 'out'} --kt-method AMXINT4 --kt-threadpool-count 2")


def test_a_damaged_scale_of_the_source_stops_the_run_before_anything_is_written(
    source: Path, tmp_path: Path, raw: Any
) -> None:
    checkpoint = raw.load(source)
    scale = checkpoint["model.layers.1.mlp.experts.0.down_proj.weight_scale"]
    scale.data = b"\xc0\x7f" + scale.data[2:]
    checkpoint.save(tmp_path / "damaged")
    command = ("repack-amx", tmp_path / "damaged", tmp_path / "out", "--method", "AMXINT4", "--numa", 1)
    result = run(*command)
    assert result.exit_code == 2
    assert "model.layers.1.mlp.experts.0.down_proj.weight_scale" in result.stderr
    assert "model.layers.1.mlp.experts.0.down_proj" in run(*command, "--dry-run").stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    "arguments",
    [["SRC", "DST"], ["DST"], ["DST", "--from-amx", "SRC", "--method", "AMXINT4"], ["SRC", "DST", "--from-amx", "SRC"]],
)
def test_arguments_that_do_not_go_together_are_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    assert run("repack-amx", *arguments, "--numa", 1).exit_code == 2
