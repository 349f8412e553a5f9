"""What a refusal of `kconvert launch` names as what would do is tried."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from kconvert.serving.table import engines

from .conftest import Made, refused, run, words_of

Written = Callable[..., Path]
K2 = "kimi-k2-thinking"
SERVERS = [name for name, engine in engines().items() if engine.command]


@pytest.mark.parametrize("engine", SERVERS)
@pytest.mark.parametrize(
    ("source", "to", "layout"),
    [
        (K2, "f16", ""),
        (K2, "int8", "experts"),
        (K2, "mxfp8", "experts"),
        (K2, "nvfp4", "compressed-tensors"),
        (K2, "mlx", ""),
        (K2, "gguf", ""),
        ("qwen3-moe", "mlx", ""),
        ("qwen3-moe", "gguf", ""),
        ("gpt-oss", "bf16", ""),
        ("gpt-oss", "mlx", ""),
        ("deepseek-v4", "int8", "experts"),
        ("deepseek-v4", "mxfp8", "experts"),
        ("kimi-k3", "mxfp4", "ktransformers"),
        ("kimi-k3", "mlx", ""),
        ("kimi-k3", "bf16", ""),
        ("mixtral", "int4", ""),
    ],
)
def test_what_a_refusal_names_makes_what_the_engine_runs(
    written: Written, like: Made, tmp_path: Path, source: str, to: str, layout: str, engine: str
) -> None:
    root = written(to, layout, source=source)
    assert_remedy_works(root, engine, like(source), tmp_path / "made")


@pytest.mark.parametrize("source", ["mixtral", "deepseek-v4", K2])
def test_and_of_int4_in_groups_of_128(written: Written, like: Made, tmp_path: Path, source: str) -> None:
    assert_remedy_works(
        written("int4", source=source, group_size=128), "ktransformers", like(source), tmp_path / "made"
    )


def assert_remedy_works(root: Path, engine: str, source: Path, made: Path) -> None:
    """The command that the refusal names runs, and the engine takes what it wrote; where it may be the source, that will do."""
    result = run("launch", root, "--engine", engine, "--source", source)
    if result.exit_code and "leave it out" in result.stderr:
        result = run("launch", root, "--engine", engine)
    named = re.search(r"`kconvert (.*?)` makes what it runs(, unless its source SRC is that already)?", result.stderr)
    if result.exit_code == 0 or named is None:
        return
    if named[2] and run("launch", source, "--engine", engine).exit_code == 0:
        return
    words = [{"SRC": str(source), "DST": str(made)}.get(word, word) for word in shlex.split(named[1])]
    ran = run(*words)
    assert ran.exit_code == 0, f"{named[0]}: {ran.stderr}"
    beside = ["--source", source] if "--layout ktransformers" in named[1] else []
    served = run("launch", made, "--engine", engine, *beside)
    if beside and "leave it out" in served.stderr:  # a DeepSeek-V4 has the layout as published
        served = run("launch", made, "--engine", engine)
    assert served.exit_code == 0, f"{named[0]}: {served.stderr}"


def test_mlx_is_offered_what_makes_it_of_a_gguf_file_whose_model_it_knows(written: Written) -> None:
    for source, offered in ((K2, True), ("qwen3-moe", True), ("deepseek-v4", False)):
        line = refused("launch", written("gguf", source=source), "--engine", "mlx")
        assert ("`kconvert convert SRC DST --to mlx` makes what it runs" in line) is offered, line
        assert "llama.cpp runs it as it is" in line


def test_a_source_that_sglang_cannot_run_is_refused_with_what_makes_one(
    like: Made, written: Written, tmp_path: Path
) -> None:
    source = written("int8", "experts")
    assert run("repack-amx", source, tmp_path / "amx", "--method", "AMXINT8", "--numa", 1, "-q").exit_code == 0
    line = refused("launch", tmp_path / "amx", "--engine", "ktransformers", "--source", source)
    assert "makes what it runs, to be given with --source" in line


def test_ktransformers_takes_no_stacks_of_gpt_oss_whose_rows_it_would_misread(written: Written) -> None:
    assert "biases and interleaved rows" in refused(
        "launch", written("bf16", source="gpt-oss"), "--engine", "ktransformers"
    )


def test_ktransformers_is_for_models_with_experts(like: Made, tmp_path: Path) -> None:
    assert (
        run(
            "sample",
            tmp_path / "dense",
            "--layers",
            1,
            "--intermediate",
            256,
            "--hidden",
            256,
            "--heads",
            4,
            "--vocab",
            512,
        ).exit_code
        == 0
    )
    assert "routed experts, and this has none" in refused("launch", tmp_path / "dense", "--engine", "ktransformers")


def test_ktransformers_reads_modelopts_nvfp4_by_its_kernel_for_avx2(written: Written) -> None:
    """On AVX-512 and AMX it stops, and names this variable."""
    result = run("launch", written("nvfp4", "modelopt"), "--engine", "ktransformers", "--json")
    facts = json.loads(result.stdout)
    assert facts["command"][:3] == ["env", "KT_MXFP4_BACKEND=avx2", "python"]
    assert words_of(facts["line"])["--kt-method"] == "NVFP4"
