"""Which engine takes which sample, as docs/MODELS.md has it in a table: what `launch` says of each."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from headers import write_headers

from kconvert import KconvertError
from kconvert.models.catalogue import GENERIC, load_manifests
from kconvert.serving.launch import launch
from kconvert.serving.place import look_at
from kconvert.serving.table import engines
from kconvert.targets.sample import SampleRecipe, plan_synthetic

from .conftest import SMALL

PAGE = Path(__file__).parents[2] / "docs" / "MODELS.md"
SERVERS = [engine for engine in engines().values() if engine.command]


def outcomes(root: Path) -> tuple[str, ...]:
    """What each engine makes of what is there: it takes that, or what a conversion makes of it, or nothing."""
    place, found = look_at(str(root)), []
    for engine in SERVERS:
        try:
            launch(place, engine.name)
            found.append("as it is")
        except KconvertError as error:
            options = str(error).partition(" DST ")[2].partition("`")[0]
            found.append(f"`{options}`" if options else "no")
    return ("yes" if place.remote_code else "", *found)


def rows(shelf: Path) -> list[str]:
    """The lines of the table."""
    models: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted(load_manifests().keys() - {GENERIC}):
        root = write_headers(plan_synthetic(SampleRecipe(name, SMALL)), shelf / name)
        models[outcomes(root)].append(f"`{name}`")
    titles = " | ".join(("samples", "code of its own", *(engine.title for engine in SERVERS)))
    lines = [f"| {titles} |", "|---" * (2 + len(SERVERS)) + "|"]
    return lines + [f"| {', '.join(names)} | {' | '.join(found)} |" for found, names in models.items()]


def test_the_document_has_what_launch_says_of_every_sample(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = "\n".join(rows(tmp_path_factory.mktemp("samples")))
    assert table in PAGE.read_text("utf-8"), table
