"""`kconvert repack-amx`: what KTransformers' loader finds in DST, from any source, for any number of NUMA nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from click.testing import CliRunner, Result

import kconvert
from kconvert import KconvertError, Recipe, convert
from kconvert.amx import open_amx
from kconvert.catalogue import load_manifest
from kconvert.cli import main
from kconvert.formats.reference import amx as reference
from kconvert.parity.oracle import independent_values
from kconvert.repack import AmxRecipe, plan_repack, plan_resplit, possible_numa
from kconvert.sample import SampleRecipe, plan_synthetic

HIDDEN, INTERMEDIATE = 256, 512
Tree = Callable[[Path], dict[str, bytes]]


def repack(source: Path, destination: Path, method: str, numa: int, **options: Any) -> Path:
    run = {name: options.pop(name) for name in ("threads", "memory", "advance", "overwrite") if name in options}
    convert(plan_repack(kconvert.inspect(source), AmxRecipe(method, numa, **options)), destination, **run)
    return destination


def resplit(source: Path, destination: Path, numa: int, form: str = "safetensors", **options: Any) -> Path:
    convert(plan_resplit(open_amx(source), numa, form, **options), destination)
    return destination


def load(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the directory, by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(root.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def source(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kimi-K2-shaped INT4 checkpoint whose experts split for 1, 2 and 4 NUMA nodes."""
    return sample(tmp_path_factory.mktemp("repack") / "tiny", moe_intermediate=INTERMEDIATE, experts=3)


@pytest.fixture(scope="module")
def dense(source: Path) -> Path:
    """`source` in BF16."""
    root = source.parent / "dense"
    convert(kconvert.plan(source, Recipe("bf16")), root)
    return root


@pytest.fixture(scope="module")
def two(source: Path) -> Path:
    """`source` as AMXINT4 for two NUMA nodes."""
    return repack(source, source.parent / "two", "AMXINT4", 2)


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
    assert config == json.loads((source / "config.json").read_text())


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


def test_a_kt_tree_with_the_rest_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KconvertError, match="with-rest"):
        repack(source, tmp_path / "out", "AMXINT4", 1, form="kt", with_rest=True)


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
