"""Whatever `kconvert launch` advises where it refuses is taken: of each kind of model in every encoding that is written, for
every engine, the command that it names makes a plan, and the engine takes what that writes.

Directories are headers over holes, and what a conversion writes is its plan: nothing is converted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from headers import write_headers

from kconvert import KconvertError, Recipe, plan
from kconvert.planning.plan import Plan
from kconvert.serving.table import engines
from kconvert.targets.registry import DEEPSEEK_V4, TARGETS
from kconvert.targets.sample import SampleRecipe, plan_synthetic

from .conftest import run

SERVERS = {engine.title: name for name, engine in engines().items() if engine.command}
SIZES = {"layers": 2, "experts": 2, "hidden": 256, "moe_intermediate": 256, "vocab": 512, "heads": 4}
# One of each kind: experts one by one, in stacks, and in gpt-oss's; all ways to call them; with and without a form for
# llama.cpp and for MLX; and each with an encoding of its own.
MODELS = (
    "deepseek-v3",
    "deepseek-v4",
    "gpt-oss",
    "kimi-k2-thinking",
    "kimi-k3",
    "minimax-m3",
    "mixtral",
    "qwen3-moe",
    "step-3",
)
Refusals: TypeAlias = "dict[tuple[Path, str], str | None]"
COMMAND = re.compile(r"`kconvert (convert .*?)` makes what it runs")
BEHIND = re.compile(r"(\S+) runs (/\S+), which it was made from")
TITLE = "|".join(map(re.escape, SERVERS))
OTHERS = re.compile(rf"((?:{TITLE})(?:, (?:{TITLE}))*) runs? it as it is")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that the command would have carried out."""
    plans: list[Plan] = []
    monkeypatch.setattr("kconvert.cli.conversions.carry_out", lambda plan, *_, **__: plans.append(plan))
    return plans


def written(source: Path, shelf: Path) -> Iterator[Path]:
    """The source, and what can be made of it."""
    yield source
    for to in TARGETS:
        for layout in {**TARGETS[to], **DEEPSEEK_V4.get(to, {})}:
            for size in (32, 128) if to == "int4" else (32,):
                try:
                    made = plan(source, Recipe(to, layout=layout, group_size=size))
                except KconvertError:
                    continue  # of this model there is none
                yield write_headers(made, shelf / f"{to}-{layout}-{size}")


def launched(root: Path, engine: str, source: Path) -> str | None:
    """The sentence of a refusal; None where there is none. A source is given where one is wanted."""
    result = run("launch", root, "--engine", engine, "--source", source)
    if result.exit_code and "leave it out" in result.stderr:
        result = run("launch", root, "--engine", engine)
    return result.stderr.strip() if result.exit_code else None


def untrue(line: str, engine: str, refusals: Refusals, root: Path, planned: list[Plan]) -> Iterator[str]:
    """What the sentence advises in vain; `refusals` are those of the source and of this root."""
    if named := COMMAND.search(line):
        made = root.parent / f"made-for-{engine}-of-{root.name}"
        words = [str(made) if word == "DST" else word for word in shlex.split(named[1])]
        result = run(*words)
        if result.exit_code:
            yield result.stderr
            return
        write_headers(planned.pop(), made)
        if (refusal := launched(made, engine, Path(words[1]))) is not None:
            yield refusal
    if (behind := BEHIND.search(line)) and refusals[Path(behind[2]), SERVERS[behind[1]]] is not None:
        yield behind[0]
    titles = [title for several in OTHERS.findall(line) for title in several.split(", ")]
    yield from (f"not {title}" for title in titles if refusals[root, SERVERS[title]] is not None)
    if not (named or behind or titles or "no other engine is known to run it either" in line):
        yield "no advice"


@pytest.mark.parametrize("model", MODELS)
def test_what_a_refusal_advises_can_be_planned_and_its_result_is_taken(
    model: str, tmp_path: Path, planned: list[Plan]
) -> None:
    source = write_headers(plan_synthetic(SampleRecipe(model, SIZES)), tmp_path / model)
    roots = list(written(source, tmp_path))
    assert len(roots) > 3
    refusals = {(root, engine): launched(root, engine, source) for root in roots for engine in SERVERS.values()}
    faults = [
        f"{root.name}, {engine}: {line}: {fault}"
        for (root, engine), line in refusals.items()
        if line is not None
        for fault in untrue(line, engine, refusals, root, planned)
    ]
    assert faults == []
