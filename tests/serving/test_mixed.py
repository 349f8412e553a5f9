"""Checkpoints of several encodings, and of none where one is declared: summaries, `launch` and the table say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kconvert import Recipe, convert, plan
from kconvert.serving.contents import contents_of_plan
from kconvert.serving.place import look_at
from kconvert.serving.table import output_of, takers
from kconvert.targets.mixed.rules import parse_mix

from .conftest import Made, refused, run

K2 = "kimi-k2-thinking"
MIXED = '"expert" = "nvfp4"\n"attention" = "fp8"'
FIRST = '"*layers.1.*" = "bf16"\n"expert" = "nvfp4"'
LAST = '"*layers.2.*" = "bf16"\n"expert" = "nvfp4"'
Mixed = Callable[..., Path]


def recipe(layout: str, rules: str) -> Recipe:
    return Recipe("recipe", mix=parse_mix(f'layout = "{layout}"\n[encodings]\n{rules}\n', "a recipe"))


@pytest.fixture(scope="module")
def mixed(like: Made, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    def made(source: str, layout: str, rules: str) -> Path:
        root = tmp_path_factory.mktemp("mixed") / "out"
        convert(plan(like(source), recipe(layout, rules)), root)
        return root

    return made


@pytest.mark.parametrize("rules", [MIXED, FIRST, LAST])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("source", [K2, "qwen3-moe", "mixtral"])
def test_the_plan_and_launch_name_the_engines_that_the_table_has_for_several_encodings(
    like: Made, mixed: Mixed, source: str, layout: str, rules: str
) -> None:
    written = look_at(str(mixed(source, layout, rules))).contents
    for contents in (contents_of_plan(plan(like(source), recipe(layout, rules))), written):
        row = output_of(contents)
        assert row is not None
        assert (row.to, row.layout) == ("recipe", layout if layout == "modelopt" else "")
        assert [engine.name for engine, _ in takers(contents)] == ["vllm", "sglang"]


def test_a_refusal_names_every_encoding(mixed: Mixed) -> None:
    for rules, said in ((MIXED, "(nvfp4 and fp8 tensor)"), (FIRST, "(nvfp4 and bf16)"), (LAST, "(nvfp4 and bf16)")):
        assert said in refused("launch", mixed(K2, "modelopt", rules), "--engine", "ktransformers")


@pytest.mark.parametrize("source", [K2, "mixtral"])
def test_what_would_do_instead_is_taken(mixed: Mixed, tmp_path: Path, source: str) -> None:
    root = mixed(source, "modelopt", MIXED)
    line = refused("launch", root, "--engine", "ktransformers")
    options = line.partition(" DST ")[2].partition("`")[0]
    assert run("convert", root, tmp_path / "out", *options.split(), "-q").exit_code == 0
    assert run("launch", tmp_path / "out", "--engine", "ktransformers").exit_code == 0


def test_experts_of_another_encoding_in_some_layer_are_told(mixed: Mixed) -> None:
    root = mixed(K2, "compressed-tensors", '"*layers.2.*experts.*" = "mxfp4"\n"expert" = "nvfp4"')
    assert "(nvfp4 and mxfp4)" in refused("launch", root, "--engine", "ktransformers")


@pytest.mark.parametrize(
    ("source", "sizes", "asked"),
    [
        (K2, {"dense_layers": 2}, "--to bf16"),
        ("kimi-k2.5", {"dense_layers": 2}, "--to bf16"),
        ("minimax-m3", {}, "--to mxfp8 --layout ktransformers"),
        ("deepseek-v3", {"dense_layers": 2}, "--to fp8 --layout all"),
    ],
)
def test_a_cut_to_dense_layers_is_what_these_are(
    tmp_path: Path, source: str, sizes: dict[str, int], asked: str
) -> None:
    words = {"layers": 3, "experts": 4, "hidden": 256, "moe-intermediate": 128, "vocab": 512, "heads": 4, **sizes}
    options = [word for key, size in words.items() for word in (f"--{key.replace('_', '-')}", size)]
    assert run("sample", tmp_path / "source", "--like", source, *options, "-q").exit_code == 0
    result = run("sample", tmp_path / "dense", "--from", tmp_path / "source", "--layers", 1)
    assert result.exit_code == 0, result.output
    contents = look_at(str(tmp_path / "dense")).contents
    row = output_of(contents)
    assert row is not None
    assert row.asked == asked
    assert {"vllm", "sglang"} <= {engine.name for engine, _ in takers(contents)}
    assert "has none" in refused("launch", tmp_path / "dense", "--engine", "ktransformers")


def test_layers_of_one_encoding_are_no_mixture(like: Made) -> None:
    """The dense layers, the shared experts and a layer behind the last are none of the routed experts' layers."""
    for name in (K2, "deepseek-v3", "kimi-k3", "glm-5.3", "ling-3", "minimax-m3"):
        assert not look_at(str(like(name))).contents.elsewhere, name


def test_a_layer_is_looked_at_as_the_kind_of_layer_that_it_is(tmp_path: Path) -> None:
    """Of Ling-3 the last layer of each group has another kind of attention."""
    words = ("--layers", 6, "--experts", 4, "--hidden", 256, "--moe-intermediate", 256, "--vocab", 512, "--heads", 8)
    assert run("sample", tmp_path / "ling", "--like", "ling-3", *words, "-q").exit_code == 0
    assert "is mxfp4 and fp8 block 128x128, declared as fp8" in refused("launch", tmp_path / "ling", "--engine", "vllm")
    result = run("convert", tmp_path / "ling", tmp_path / "out", "--to", "bf16")
    assert "engines: transformers (as it is), vLLM (as it is)" in result.stdout


def test_the_closing_line_has_them(like: Made, tmp_path: Path) -> None:
    words = ("--recipe", "nvfp4-fp8-attention", "--layout", "modelopt", "--json")
    facts = json.loads(run("convert", like("qwen3-moe"), tmp_path / "out", *words).stdout)
    assert list(facts["engines"]) == ["vllm", "sglang"]
