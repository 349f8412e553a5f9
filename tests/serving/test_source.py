"""AMX weights are served beside the checkpoint that they were made from, which has to be found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Made, refused, run, words_of

K2 = "kimi-k2-thinking"


@pytest.fixture(scope="module")
def amx(like: Made, shelf: Path) -> Path:
    root = shelf / "amx"
    assert run("repack-amx", like(K2), root, "--method", "AMXINT4", "--numa", 2, "-q").exit_code == 0
    return root


def launched(*arguments: object) -> dict[str, str]:
    result = run("launch", *arguments, "--engine", "ktransformers")
    assert result.exit_code == 0, result.stderr
    return words_of(result.stdout.strip())


def test_the_source_beside_the_weights_is_found_and_the_nodes_are_the_weights(amx: Path, like: Made) -> None:
    flags = launched(amx, "--cores", 56)
    assert (flags["--model"], flags["--kt-weight-path"]) == (str(like(K2)), str(amx))
    assert (flags["--kt-method"], flags["--kt-threadpool-count"], flags["--kt-cpuinfer"]) == ("AMXINT4", "2", "56")
    assert {"--trust-remote-code", "--kt-num-gpu-experts", "--tool-call-parser", "--reasoning-parser"} <= flags.keys()


def test_a_source_elsewhere_is_asked_for(amx: Path, like: Made, tmp_path: Path) -> None:
    moved = tmp_path / "amx"
    shutil.copytree(amx, moved)
    assert "does not lie beside it; say where it is with --source" in refused(
        "launch", moved, "--engine", "ktransformers"
    )
    assert launched(moved, "--source", like(K2))["--model"] == str(like(K2))


def test_a_source_on_the_hub_is_told_by_its_id_and_commit_without_a_look(amx: Path, tmp_path: Path) -> None:
    moved = tmp_path / "amx"
    shutil.copytree(amx, moved)
    record = json.loads((moved / "kconvert.json").read_text())
    (moved / "kconvert.json").write_text(json.dumps({**record, "source": "org/model", "revision": "abc"}))
    flags = launched(moved)
    assert (flags["--model"], flags["--revision"]) == ("org/model", "abc")
    assert flags["--tool-call-parser"] == "kimi_k2"


def test_a_source_that_is_no_directory_is_said_to_be_looked_for_on_the_hub(amx: Path, like: Made) -> None:
    said = "no directory here is called my/mistake: KTransformers is to look for it on the Hub"
    assert said in run("launch", amx, "--engine", "ktransformers", "--source", "my/mistake").stderr
    assert "on the Hub" not in run("launch", amx, "--engine", "ktransformers", "--source", like(K2)).stderr


def test_other_engines_are_told_the_name_of_a_source_that_is_not_here(amx: Path, tmp_path: Path) -> None:
    moved = tmp_path / "amx"
    shutil.copytree(amx, moved)
    record = json.loads((moved / "kconvert.json").read_text())
    (moved / "kconvert.json").write_text(json.dumps({**record, "source": "org/model", "revision": "abc"}))
    line = refused("launch", moved, "--engine", "vllm")
    assert "give the checkpoint that it was made from ('org/model@abc'), and KTransformers runs it as it is" in line


def test_nodes_that_the_weights_are_not_split_for_are_refused_with_the_command_that_splits_them(amx: Path) -> None:
    line = refused("launch", amx, "--engine", "ktransformers", "--numa", 4)
    assert f"kconvert repack-amx --from-amx {amx} DST --numa 4" in line
    line = refused("launch", amx, "--engine", "ktransformers", "--numa", 3)
    assert "--from-amx" not in line
    assert line.endswith("which would do for AMXINT4 with --numa 1, 2, 4 and AMXINT8 with --numa 1, 2, 4, 8")


def test_a_source_of_dense_layers_alone_is_no_source(amx: Path, like: Made, tmp_path: Path) -> None:
    run("sample", tmp_path / "dense", "--from", like(K2), "--layers", 1)
    line = refused("launch", amx, "--engine", "ktransformers", "--source", tmp_path / "dense")
    assert line == (
        f"error: {tmp_path / 'dense'} has no routed experts; give the checkpoint that {amx} was made from with --source"
    )


def test_a_core_for_each_of_the_weights_nodes_is_wanted(amx: Path) -> None:
    line = refused("launch", amx, "--engine", "ktransformers", "--cores", 1)
    assert line.endswith("2 NUMA nodes want a core each, and --cores is 1; give --cores 2 or more")


def test_a_source_that_sglang_cannot_run_is_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    int8 = written("int8", "experts")
    assert run("repack-amx", int8, tmp_path / "amx", "--method", "AMXINT8", "--numa", 1, "-q").exit_code == 0
    line = refused("launch", tmp_path / "amx", "--engine", "ktransformers", "--source", int8)
    assert "SGLang cannot run" in line


def test_other_engines_are_told_to_run_the_source(amx: Path, like: Made) -> None:
    line = refused("launch", amx, "--engine", "vllm")
    assert f"vLLM runs {like(K2)}, which it was made from, and KTransformers runs it as it is" in line


def test_a_source_is_wanted_by_nothing_else(like: Made) -> None:
    assert "--source is for" in refused("launch", like(K2), "--engine", "vllm", "--source", like(K2))


@pytest.mark.parametrize("how", ["repack-amx", "inspect", "resplit"])
def test_the_commands_that_repack_and_inspect_print_are_those_of_launch(
    amx: Path, like: Made, tmp_path: Path, how: str
) -> None:
    if how == "inspect":
        result, weights, numa = run("inspect", amx), amx, "2"
    elif how == "repack-amx":
        weights, numa = tmp_path / "out", "1"
        result = run("repack-amx", like(K2), weights, "--method", "AMXINT4", "--numa", 1)
    else:
        weights, numa = amx.parent / "four", "4"
        result = run("repack-amx", "--from-amx", amx, weights, "--numa", 4)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("launch: ")]
    options = ("--source", like(K2)) if how == "repack-amx" else ()
    assert words_of(line.removeprefix("launch: ")) == launched(weights, *options)
    assert words_of(line)["--kt-threadpool-count"] == numa
    if how == "resplit":
        shutil.rmtree(weights)


def test_every_conversion_says_at_its_end_who_takes_the_result(like: Made, tmp_path: Path) -> None:
    result = run("convert", like(K2), tmp_path / "out", "--to", "fp8")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("engines: ")]
    assert line.split()[1] == "transformers"
    assert "KTransformers (FP8)" in line
    facts = json.loads(run("convert", like(K2), tmp_path / "json", "--to", "mxfp8", "--json").stdout)
    assert list(facts["engines"]) == ["vllm"]


def test_a_part_of_a_model_is_no_fault_of_the_summary(like: Made, tmp_path: Path) -> None:
    parts = ("--include", "*.shared_experts.*", "--include", "*experts.0.*")
    result = run("convert", like(K2), tmp_path / "out", "--to", "bf16", *parts)
    assert result.exit_code == 0, result.output


def test_another_models_checkpoint_is_no_source(amx: Path, like: Made, tmp_path: Path) -> None:
    line = refused("launch", amx, "--engine", "ktransformers", "--source", like("mixtral"))
    assert "experts of 512 x 256" in line
    assert "256 x 256" in line


def test_amx_weights_that_are_half_written_are_unfinished(amx: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(amx, half)
    (half / "kconvert.json").unlink()
    assert "unfinished, run the conversion again" in refused("launch", half, "--engine", "ktransformers")


@pytest.mark.parametrize("to", ["mxfp4", "mxfp8"])
def test_experts_under_another_models_names_are_served_beside_their_source_as_well(
    written: Callable[..., Path], like: Made, to: str
) -> None:
    root = written(to, "ktransformers")
    flags = launched(root)
    assert (flags["--model"], flags["--kt-weight-path"]) == (str(like(K2)), str(root))
    assert flags["--kt-method"] == to.upper()


def test_a_model_whose_experts_have_these_names_already_needs_no_source(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    bf16 = written("bf16", source="deepseek-v4")
    result = run("convert", bf16, tmp_path / "out", "--to", "mxfp4", "--layout", "ktransformers")
    assert "KTransformers (MXFP4)" in result.stdout
    assert not (tmp_path / "out" / "kconvert.json").exists()


def test_what_still_has_another_models_names_is_for_no_engine(written: Callable[..., Path], tmp_path: Path) -> None:
    result = run("convert", written("mxfp4", "ktransformers"), tmp_path / "out", "--to", "bf16")
    assert "engines: none is known to take this" in result.stdout
    line = refused("launch", tmp_path / "out", "--engine", "vllm")
    assert "the experts have another model's names; give the checkpoint that it was made from" in line


def test_repacking_says_who_takes_the_weights_and_that_it_wants_the_source(like: Made, tmp_path: Path) -> None:
    result = run("repack-amx", like(K2), tmp_path / "out", "--method", "AMXINT8", "--numa", 1)
    assert "engines: KTransformers (AMXINT8, beside its source)" in result.stdout.splitlines()
    words = ("--method", "AMXINT8", "--numa", 1, "--json")
    facts = json.loads(run("repack-amx", like(K2), tmp_path / "json", *words).stdout)
    assert facts["engines"] == {"ktransformers": "AMXINT8"}
    assert "launch" in facts


def test_of_amx_weights_no_more_headers_are_read_than_tell_the_sizes(like: Made, tmp_path: Path) -> None:
    words = ("--method", "AMXINT4", "--numa", 2, "--shard-size", "200KB", "-q")
    assert run("repack-amx", like(K2), tmp_path / "amx", *words).exit_code == 0
    *_, last = sorted((tmp_path / "amx").glob("*.safetensors"))
    whole = launched(tmp_path / "amx", "--source", like(K2))
    last.write_bytes(b"no header")
    assert launched(tmp_path / "amx", "--source", like(K2)) == whole
    assert whole["--kt-threadpool-count"] == "2"
