"""`kconvert launch`: the command that serves a directory, and the sentence where there is none."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.serving.launch import launch
from kconvert.serving.place import look_at

from .conftest import Made, command, refused, run, words_of

K2 = "kimi-k2-thinking"
Written = Callable[..., Path]


def reconfigured(source: Path, root: Path, **keys: Any) -> Path:
    """A copy with other keys in config.json; None takes one away."""
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".kconvert"))
    config = {**json.loads((root / "config.json").read_text()), **keys}
    (root / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return root


def test_kimi_k2_thinking_is_served_by_vllm_as_its_model_card_says(like: Made) -> None:
    root = like(K2)
    assert command(root, "--engine", "vllm", "--gpus", 4) == (
        f"vllm serve {root} --trust-remote-code --enable-auto-tool-choice --tool-call-parser kimi_k2 "
        "--reasoning-parser kimi_k2 --tensor-parallel-size 4"
    )


def test_and_by_sglang(like: Made) -> None:
    root = like(K2)
    assert command(root, "--engine", "sglang", "--gpus", 4, "--context", 4096) == (
        f"python -m sglang.launch_server --model {root} --trust-remote-code --tool-call-parser kimi_k2 "
        "--reasoning-parser kimi_k2 --tp 4 --context-length 4096"
    )


def test_and_by_ktransformers_with_all_flags_without_which_it_does_not_start(like: Made) -> None:
    root = like(K2)
    flags = words_of(command(root, "--engine", "ktransformers", "--cores", 56, "--numa", 2, "--gpu-experts", 3))
    assert flags["--model"] == flags["--kt-weight-path"] == str(root)
    assert flags["--kt-method"] == "RAWINT4"
    assert (flags["--kt-cpuinfer"], flags["--kt-threadpool-count"], flags["--kt-num-gpu-experts"]) == ("56", "2", "3")


@pytest.mark.parametrize(
    ("to", "layout", "method"),
    [
        ("bf16", "", "BF16"),
        ("fp8", "experts", "FP8"),
        ("fp8", "all", "FP8"),
        ("fp8", "compressed-tensors", "FP8"),
        ("fp8", "compressed-tensors-channel", "FP8_PERCHANNEL"),
    ],
)
def test_ktransformers_gets_the_method_of_the_encoding(written: Written, to: str, layout: str, method: str) -> None:
    assert words_of(command(written(to, layout), "--engine", "ktransformers"))["--kt-method"] == method


def test_the_path_is_a_whole_one_and_quoted(like: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(like(K2), tmp_path / "my model")
    monkeypatch.chdir(tmp_path)
    line = command("my model", "--engine", "vllm")
    assert shlex.split(line)[2] == str(tmp_path / "my model")


def test_remote_code_is_trusted_only_where_the_model_has_some(like: Made, tmp_path: Path) -> None:
    bare = reconfigured(like(K2), tmp_path / "bare", auto_map=None)
    assert "--trust-remote-code" not in command(bare, "--engine", "vllm")
    (bare / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    assert "--trust-remote-code" in command(bare, "--engine", "vllm")


@pytest.mark.parametrize(
    ("name", "engine", "parsers"),
    [
        ("kimi-k3", "vllm", ("kimi_k3", "kimi_k3")),
        ("deepseek-v4", "vllm", ("deepseek_v4", "deepseek_v4")),
        ("deepseek-v4", "sglang", ("deepseekv4", "deepseek-v4")),
        ("gpt-oss", "sglang", ("gpt-oss", "gpt-oss")),
        ("minimax-m3", "vllm", ("minimax_m3", "minimax_m3")),
    ],
)
def test_parsers_are_the_models_own(like: Made, name: str, engine: str, parsers: tuple[str, str]) -> None:
    flags = words_of(command(like(name), "--engine", engine))
    assert (flags["--tool-call-parser"], flags["--reasoning-parser"]) == parsers


def test_a_model_whose_template_knows_tools_but_no_thinking_gets_no_reasoning_parser(
    like: Made, tmp_path: Path
) -> None:
    root = reconfigured(like(K2), tmp_path / "instruct")
    (root / "chat_template.jinja").write_text("{% if tools %}<|im_system|>tool_declare{% endif %}")
    line = command(root, "--engine", "sglang")
    assert "--tool-call-parser kimi_k2" in line
    assert "--reasoning-parser" not in line


@pytest.mark.parametrize(
    ("to", "layout", "engine", "instead"),
    [
        ("int8", "experts", "sglang", "--to fp8 --layout compressed-tensors-channel"),
        ("mxfp4", "experts", "ktransformers", "--to bf16"),  # beside MXFP4 that SGLang runs, MXFP4 would do
        ("mxfp8", "experts", "sglang", "--to fp8"),
        ("bf16", "", "llama.cpp", "--to gguf"),
        ("bf16", "", "mlx", "--to mlx"),
    ],
)
def test_what_an_engine_cannot_run_is_refused_with_what_would_do(
    written: Written, to: str, layout: str, engine: str, instead: str
) -> None:
    line = refused("launch", written(to, layout), "--engine", engine)
    assert "cannot run" in line
    assert f"{instead}` makes what it runs" in line


def test_int4_in_groups_of_128_is_refused_for_ktransformers_which_would_answer_nan(written: Written) -> None:
    root = written("int4", source=K2, group_size=128)
    assert "NaN" in refused("launch", root, "--engine", "ktransformers")
    assert "--kt" not in command(root, "--engine", "sglang")


def test_kimi_k3_is_refused_for_ktransformers(like: Made) -> None:
    assert "no code for this model" in refused("launch", like("kimi-k3"), "--engine", "ktransformers")


def test_gguf_files_are_for_llama_cpp_and_mlx_directories_for_mlx(written: Written) -> None:
    gguf, mlx = written("gguf"), written("mlx")
    (file,) = gguf.glob("*.gguf")
    for address in (gguf, file):
        assert command(address, "--engine", "llama.cpp", "--context", 2048) == (
            f"llama-server --jinja --model {file} --ctx-size 2048"
        )
    assert command(mlx, "--engine", "mlx").startswith(f"mlx_lm.server --model {mlx}")
    assert "llama.cpp runs it as it is" in refused("launch", gguf, "--engine", "vllm")
    assert "MLX runs it as it is" in refused("launch", mlx, "--engine", "sglang")


def test_dense_layers_for_mlx_are_for_mlx_whose_kv_b_is_by_heads(like: Made, tmp_path: Path) -> None:
    dense, mlx = tmp_path / "dense", tmp_path / "mlx"
    run("sample", dense, "--from", like("kimi-k2-thinking"), "--layers", 1)
    result = run("convert", dense, mlx, "--to", "mlx")
    assert result.output.splitlines()[-1] == "engines: MLX (mlx_lm.server)", result.output
    assert command(mlx, "--engine", "mlx").startswith(f"mlx_lm.server --model {mlx}")
    assert "MLX runs it as it is" in refused("launch", mlx, "--engine", "vllm")


def test_what_an_engine_cannot_be_asked_for_is_said(written: Written, like: Made) -> None:
    assert "llama.cpp cannot be asked for --gpus" in refused(
        "launch", written("gguf"), "--engine", "llama.cpp", "--gpus", 2
    )
    assert "vLLM cannot be asked for --cores and --numa" in refused(
        "launch", like(K2), "--engine", "vllm", "--numa", 2, "--cores", 8
    )


def test_json_has_the_command_word_by_word_and_the_notes(like: Made) -> None:
    facts = json.loads(command(like(K2), "--engine", "ktransformers", "--json"))
    assert shlex.split(facts["line"]) == facts["command"]
    assert facts["package"] == "sglang-kt kt-kernel"
    assert any("sglang-kt" in note for note in facts["notes"])
    assert facts["by"] == "RAWINT4"


def test_flags_behind_two_hyphens_are_handed_on(like: Made) -> None:
    assert command(like(K2), "--engine", "vllm", "--", "--port", "8001").endswith(" --port 8001")


def test_exec_runs_the_command_in_place_of_kconvert(like: Made, tmp_path: Path) -> None:
    fake = tmp_path / "vllm"
    fake.write_text('#!/bin/sh\necho "started: $@"\n')
    fake.chmod(0o755)
    words = ["launch", str(like(K2)), "--engine", "vllm", "--exec"]
    code = "import sys; from kconvert.cli import main; main(sys.argv[1:], prog_name='kconvert')"
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"started: serve {like(K2)}")


def test_exec_of_what_is_not_installed_is_one_sentence(like: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = run("launch", like(K2), "--engine", "vllm", "--exec")
    assert result.exit_code == 2
    assert "install vllm" in result.stderr


def test_it_reads_headers_of_one_file_and_imports_neither_torch_nor_transformers(
    sample: Written, tmp_path: Path
) -> None:
    root = sample(tmp_path / "many", moe_intermediate=512)
    shards = sorted(root.glob("*.safetensors"))
    assert len(shards) > 3
    last = shards[-1].read_bytes()
    shards[-1].write_bytes(b"\xff" * len(last))  # nobody looks there
    code = (
        "import sys; from kconvert.cli import main\n"
        "try: main(sys.argv[1:], prog_name='kconvert')\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    words = ["launch", str(root), "--engine", "vllm", "--gpus", "2", "--gpu-memory", "80"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("vllm serve"), result.stderr
    loaded = {name.partition(".")[0] for name in result.stderr.split()}
    assert not loaded & {"torch", "transformers", "numpy", "numba", "huggingface_hub", "compressed_tensors"}


def test_a_model_without_a_manifest_is_served_by_what_its_tensors_show(like: Made, tmp_path: Path) -> None:
    root = reconfigured(like("qwen3-moe"), tmp_path / "own", model_type="of-my-own")
    assert command(root, "--engine", "vllm", "--gpus", 2) == f"vllm serve {root} --tensor-parallel-size 2"
    assert words_of(command(root, "--engine", "ktransformers"))["--kt-method"] == "BF16"
    line = refused("launch", root, "--engine", "mlx")
    assert "this is a checkpoint of safetensors files; vLLM, SGLang, KTransformers run it as it is" in line


def test_nothing_to_serve_is_one_sentence(tmp_path: Path, like: Made) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("launch", tmp_path / "empty", "--engine", "vllm")
    assert "nowhere" in refused("launch", tmp_path / "nowhere", "--engine", "vllm")
    broken = reconfigured(like(K2), tmp_path / "broken", quantization_config={"quant_method": "unheard-of"})
    assert "unheard-of" in refused("launch", broken, "--engine", "vllm")


def test_the_same_from_python(like: Made) -> None:
    found = launch(look_at(str(like(K2))), "vllm")
    assert found.line == command(like(K2), "--engine", "vllm")
    with pytest.raises(KconvertError, match="GGUF"):
        launch(look_at(str(like(K2))), "llama.cpp")


@pytest.mark.parametrize(("name", "state"), [("config.json", False), ("config.json", True)])
def test_what_no_engine_loads_is_not_served(like: Made, tmp_path: Path, name: str, state: bool) -> None:
    root = reconfigured(like(K2), tmp_path / "half")
    (root / name).unlink()
    if state:
        (root / ".kconvert").mkdir()
    said = "unfinished, run the conversion again" if state else "no engine loads it without"
    assert said in refused("launch", root, "--engine", "vllm")


@pytest.mark.parametrize("command", ["launch", "inspect", "convert"])
def test_what_a_conversion_left_before_its_first_file_was_whole_is_unfinished(tmp_path: Path, command: str) -> None:
    root = tmp_path / "begun"
    (root / ".kconvert").mkdir(parents=True)
    options: dict[str, list[object]] = {
        "launch": ["--engine", "vllm"],
        "inspect": [],
        "convert": [tmp_path / "out", "--to", "bf16"],
    }
    line = refused(command, root, *options[command])
    assert line == f"error: {root} is unfinished, it has no weights yet; run the conversion again"
