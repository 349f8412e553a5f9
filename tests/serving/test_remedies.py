"""What a refusal of `kconvert launch` names as what would do is tried."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Made, refused, run, words_of

Written = Callable[..., Path]
K2 = "kimi-k2-thinking"


@pytest.mark.parametrize(
    ("source", "engine", "offered"),
    [
        (K2, "mlx", True),
        ("qwen3-moe", "mlx", True),
        ("deepseek-v4", "mlx", False),
        ("deepseek-v4", "ktransformers", True),
        ("gpt-oss", "vllm", True),
        ("gpt-oss", "ktransformers", False),
        ("kimi-k3", "sglang", True),
        ("kimi-k3", "ktransformers", False),
    ],
)
def test_of_a_gguf_file_the_checkpoint_behind_it_is_asked_for_where_the_engine_knows_its_model(
    written: Written, source: str, engine: str, offered: bool
) -> None:
    line = refused("launch", written("gguf", source=source), "--engine", engine)
    assert ("give the checkpoint that it was made from, and" in line) is offered, line
    assert line.endswith("llama.cpp runs it as it is")
    assert "kconvert convert" not in line


def test_the_checkpoint_that_was_given_as_the_source_is_named_with_what_is_to_be_done_with_it(
    written: Written, like: Made
) -> None:
    gguf, root = written("gguf", source="deepseek-v4"), like("deepseek-v4")
    line = refused("launch", gguf, "--engine", "vllm", "--source", root)
    assert f"vLLM runs {root}, which it was made from, and llama.cpp runs it as it is" in line
    int8 = written("int8", "experts")
    line = refused("launch", gguf, "--engine", "sglang", "--source", int8)
    assert f"`kconvert convert {int8} DST --to bf16` makes what it runs" in line


def test_what_is_named_is_converted_and_then_served(written: Written, tmp_path: Path) -> None:
    """The others are planned, see test_advice."""
    line = refused("launch", written("f16"), "--engine", "ktransformers")
    words = shlex.split(line.partition("`kconvert ")[2].partition("`")[0])
    assert run(*words[:2], tmp_path / "out", *words[3:], "-q").exit_code == 0
    assert words_of(run("launch", tmp_path / "out", "--engine", "ktransformers").stdout)["--kt-method"] == "FP8"


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
