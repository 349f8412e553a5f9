"""A small Kimi-K2 in every encoding that is written, and a DeepSeek-V4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sizes import SIZES

from kconvert import Recipe, convert, plan
from kconvert.cli import main
from kconvert.targets.sample import SampleRecipe, plan_synthetic

WIDE = {**SIZES, "moe_intermediate": 512, "heads": 32}
SMALL = {"layers": 4, "experts": 4, "hidden": 256, "moe_intermediate": 256, "vocab": 512, "heads": 8}
Made = Callable[[str], Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="kconvert", catch_exceptions=False)


def refused(*arguments: object) -> str:
    """The one sentence of a command that ends with exit code 2."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def command(*arguments: object) -> str:
    """The line that `kconvert launch` prints."""
    result = run("launch", *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def like(shelf: Path) -> Made:
    """`like(manifest)`: a sample of that model."""

    def made(name: str) -> Path:
        root = shelf / f"like-{name}"
        if not root.exists():
            convert(plan_synthetic(SampleRecipe(name, WIDE if name.startswith("kimi-k2") else SMALL)), root)
        return root

    return made


@pytest.fixture(scope="session")
def written(shelf: Path, like: Made) -> Callable[..., Path]:
    """`written(to, layout, source=, **recipe)`: Kimi-K2-Thinking, or another model, in that encoding."""

    def made(to: str, layout: str = "", source: str = "kimi-k2-thinking", **recipe: object) -> Path:
        words = [source, to, layout, *map(str, recipe.values())]
        root = shelf / "-".join(filter(None, words))
        if not root.exists():
            convert(plan(like(source), Recipe(to, layout=layout, **recipe)), root)  # type: ignore[arg-type]
        return root

    return made


def words_of(line: str) -> dict[str, str]:
    """Flag -> what follows it ("" for another flag)."""
    words = line.split()
    return {
        w: "" if f.startswith("--") else f for w, f in zip(words, [*words[1:], "--"], strict=True) if w.startswith("--")
    }
