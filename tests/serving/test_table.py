"""The table of engines: every output has its row and is known by what it holds, and the document shows the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kconvert import Recipe, plan
from kconvert.formats.engines.amx import METHODS
from kconvert.serving.contents import contents_of_plan
from kconvert.serving.document import with_tables
from kconvert.serving.table import cell_of, engines, output_of, outputs, table, takers
from kconvert.targets.amx import AmxRecipe, plan_repack
from kconvert.targets.registry import DEEPSEEK_V4, TARGETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "ENGINES.md"
K2, V4 = "kimi-k2-thinking", "deepseek-v4"
# The K2 sample is INT4 in groups of 32 already, and a V4 has the layout for kt-kernel.
MADE = [
    *((K2, to, layout) for to, layouts in TARGETS.items() for layout in layouts if to != "int4"),
    *((V4, to, layout) for to, layouts in DEEPSEEK_V4.items() for layout in layouts if to != "mxfp4"),
]


def test_the_document_shows_the_table() -> None:
    page = DOCUMENT.read_text("utf-8")
    assert with_tables(page) == page


def test_every_output_that_is_written_has_a_row_and_no_other_output_has_one() -> None:
    written = {(to, layout) for to, layouts in (*TARGETS.items(), *DEEPSEEK_V4.items()) for layout in layouts}
    assert {(row.to, row.layout) for row in outputs()} == {
        *written,
        *((method, "") for method in METHODS),
        ("mxfp4", ""),
        ("recipe", ""),
        ("recipe", "modelopt"),
    }


@pytest.mark.parametrize(("model", "to", "layout"), MADE)
def test_an_output_is_known_by_its_headers_and_config_as_what_it_was_made_as(
    like: Callable[[str], Path], model: str, to: str, layout: str
) -> None:
    contents = contents_of_plan(plan(like(model), Recipe(to, layout=layout)))
    found = output_of(contents)
    assert found is not None
    assert (found.to, found.layout) == (to, layout)
    assert [*takers(contents)], "nobody takes it"


@pytest.mark.parametrize("name", [K2, V4, "kimi-k2-instruct", "kimi-k2.5", "kimi-k3", "minimax-m3", "gpt-oss"])
def test_models_as_published_have_rows(like: Callable[[str], Path], name: str) -> None:
    from kconvert.serving.place import look_at

    contents = look_at(str(like(name))).contents
    assert output_of(contents) is not None
    assert {"vllm", "sglang"} <= {engine.name for engine, _ in takers(contents)}


@pytest.mark.parametrize("method", METHODS)
def test_amx_weights_are_taken_by_ktransformers_alone(like: Callable[[str], Path], method: str) -> None:
    from kconvert import inspect

    contents = contents_of_plan(plan_repack(inspect(like(K2)), AmxRecipe(method, 2)))
    assert [(engine.name, cell.by) for engine, cell in takers(contents)] == [("ktransformers", method)]


def test_what_would_do_instead_is_an_output_that_the_engine_takes() -> None:
    rows = {row.asked: row for row in outputs()}
    rows["--to fp8"] = rows["--to fp8 --layout experts"]
    rows["--to int4 --group-size 32"] = rows["--to int4"]
    for row in outputs():
        for name, cell in row.cells.items():
            assert bool(cell.by) != bool(cell.no) or cell.models, (row.asked, name)
            if cell.instead:
                assert rows[cell.instead].cells[name].by, (row.asked, name)
    for name, engine in engines().items():
        assert all(rows[options].cells[name].by for options in engine.instead), name
        assert bool(engine.instead) == bool(engine.command), name


def test_every_cell_says_how_it_is_known() -> None:
    known = {cell.evidence for row in outputs() for cell in row.cells.values()}
    assert known == table()["evidence"].keys()
    assert all(row.cells.keys() <= engines().keys() for row in outputs())


def test_every_engine_that_has_a_command_can_be_asked_for() -> None:
    from kconvert.cli.launch import ENGINES

    assert {name for name, engine in engines().items() if engine.command} == set(ENGINES)


def test_parsers_are_those_of_engines_that_there_are() -> None:
    from kconvert.models.catalogue import load_manifests

    for manifest in load_manifests().values():
        assert manifest.serving.keys() <= engines().keys()
        for told in manifest.serving.values():
            assert told.keys() <= {"tools", "reasoning", "flags", "instead", "no"}


def test_int4_in_other_groups_than_32_is_nothing_for_ktransformers(like: Callable[[str], Path]) -> None:
    contents = contents_of_plan(plan(like(K2), Recipe("int4", group_size=64)))
    row = output_of(contents)
    assert row is not None
    cell = cell_of(engines()["ktransformers"], row, contents)
    assert "NaN" in cell.no
    assert cell.instead == "--to int4 --group-size 32"


def test_sglang_takes_nvfp4_with_scales_of_activations_by_another_class(like: Callable[[str], Path]) -> None:
    bare, scaled = (
        contents_of_plan(plan(like(name), Recipe("nvfp4", layout="compressed-tensors")))
        for name in (K2, "kimi-k2-thinking-nvfp4")
    )
    assert (bare.activations, scaled.activations) == (False, True)
    for contents, first in ((bare, "CompressedTensorsW4A16Nvfp4MoE"), (scaled, "CompressedTensorsW4A4Nvfp4MoE, below")):
        by = {engine.name: cell.by for engine, cell in takers(contents)}
        assert by["sglang"].startswith(first)


def test_blocks_that_are_cut_off_are_nothing_for_transformers(sample: Callable[..., Path], tmp_path: Path) -> None:
    source = sample(tmp_path / "narrow", moe_intermediate=192)
    contents = contents_of_plan(plan(source, Recipe("fp8")))
    assert [engine.name for engine, _ in takers(contents)] == []
    channel = contents_of_plan(plan(source, Recipe("fp8", layout="compressed-tensors-channel")))
    assert {engine.name for engine, _ in takers(channel)} == {"transformers", "vllm", "sglang", "ktransformers"}
