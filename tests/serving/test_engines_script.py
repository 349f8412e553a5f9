"""`make engines`: an engine that cannot be had is a line and a column that says so, and never an old result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "engines"
MODULES = ("environments", "outputs", "served", "run")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The script's modules by name, whose environments are made in `tmp_path`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    found = {name: import_module(name) for name in MODULES}
    monkeypatch.setattr(found["environments"], "FOLDER", tmp_path)
    yield found
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def environments(scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of engines for which no package can be had; what pip was asked for is in `asked`."""
    environments = scripts["environments"]
    environments.asked = []

    def pip(python: Path, *words: str) -> None:
        environments.asked.append(words)
        raise environments.Refused(f"no matching distribution for {words[0]}")

    monkeypatch.setattr(environments, "_pip", pip)
    monkeypatch.setattr(environments.venv, "create", lambda folder, **options: folder.mkdir())
    return environments


def test_an_engine_that_cannot_be_installed_is_a_sentence_and_leaves_nothing_behind(environments: Any) -> None:
    found = environments.environment("mlx")
    assert found.python is None
    assert found.remark == "cannot be installed here: no matching distribution for --no-deps"
    assert not list(environments.FOLDER.iterdir())


def test_where_the_torch_of_a_pin_cannot_be_had_the_projects_own_is_asked_for(environments: Any) -> None:
    assert environments.environment("kt").python is None
    (pinned, own) = environments.asked
    assert pinned == ("torch==2.9.1", "--index-url", environments.CPU_WHEELS)
    assert own == (f"torch=={environments.version('torch')}",)


def test_what_is_put_beside_an_engine_that_cannot_be_had_cannot_be_had_either(environments: Any) -> None:
    said = environments.environment("sglang").remark
    assert said.startswith("cannot be installed here: vllm cannot be installed here: no matching distribution")


def test_the_column_of_an_engine_that_was_not_run_says_so(scripts: dict[str, Any]) -> None:
    run, environment = scripts["run"], scripts["environments"].Environment
    cells = {"transformers": run.Cell("="), "vllm": run.Cell("no", "why")}
    found = {"transformers": environment("python", "transformers 5"), "vllm": environment(None, remark="cannot be had")}
    text = run.rendered({"bf16": cells}, found)
    assert "| bf16 | = | not run |" in text.splitlines()
    assert "- vllm: cannot be had" in text.splitlines()


def test_a_part_of_the_table_is_never_written_over_the_whole(
    scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "bf16", "--write", "docs/ENGINES.md"])
    with pytest.raises(SystemExit):
        scripts["run"].arguments()
    assert "the page has the whole table" in capsys.readouterr().err
