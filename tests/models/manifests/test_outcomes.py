"""docs/MODELS.md says what can be made of each model's published encoding, and of each encoding; plans say the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kconvert import KconvertError, Recipe, inspect
from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.formats.gptq import Gptq
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.models.catalogue import load_manifests
from kconvert.models.model import Model
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Transcode
from kconvert.targets.amx import AmxRecipe, plan_repack
from kconvert.targets.gguf.architectures import ARCHITECTURES
from kconvert.targets.planner import PLANNERS, make_plan
from kconvert.targets.registry import TARGETS

DOCUMENT = Path(__file__).parents[3] / "docs" / "MODELS.md"
FAMILIES = sorted(set(load_manifests()) - {"generic"})
TO = tuple(to for to in TARGETS if to != "f16" and to not in PLANNERS)  # which have encodings of several kinds
WORDS = {"lossless": "kept", "recovered": "found", "lossy": "rounded"}
ENCODINGS: dict[str, Format] = {
    "BF16": Dense("BF16"),
    "INT4 group 32, GPTQ, AWQ": Packed(32),
    "INT8": Int8(),
    "FP8": Fp8(),
    "FP8, scales powers of two": Fp8(powers=True),
    "MXFP4": Mx(4),
    "MXFP8": Mx(8),
    "NVFP4": Nvfp4(),
}


def tables() -> Iterator[list[str]]:
    """The rows of the document's tables, as cells."""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def outcome(made: Plan) -> str:
    """The worst that becomes of what the target is for."""
    steps = [step for step in made.steps if isinstance(step, Transcode)]
    fates = {step.target.fate(step.source) for step in steps if step.target.quantised or made.facts["to"] == "bf16"}
    return next((WORDS[fate] for fate in ("lossy", "recovered", "lossless") if fate in fates), "kept")


def planned(model: Model, to: str) -> str:
    try:
        return outcome(make_plan(model, Recipe(to)))
    except KconvertError as error:
        return "is it" if "nothing to convert" in str(error) else "no"


def repacked(model: Model) -> str:
    try:
        plan_repack(model, AmxRecipe("AMXINT4", 1))
    except KconvertError:
        return "no"
    return "rounded"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_can_be_made_of_a_published_model_is_in_the_table(small_sample: Callable[[str], Path], name: str) -> None:
    model = inspect(small_sample(name))
    labels = sorted({weight.format.label for weight in model.weights if weight.format.quantised}) or ["bf16"]
    cells = [", ".join(labels), *(planned(model, to) for to in TO), repacked(model)]
    (row,) = [row for row in tables() if f"`{name}`" in row[0] and len(row) == len(cells) + 1]
    assert row[1:] == cells


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_model_is_in_gguf_is_in_the_table(small_sample: Callable[[str], Path], name: str) -> None:
    rows = [row[1:] for row in tables() if f"`{name}`" in row[0] and row[1] in ARCHITECTURES.values()]
    if not rows:
        with pytest.raises(KconvertError, match="no mapping to GGUF yet"):
            make_plan(inspect(small_sample(name)), Recipe("gguf"))
        return
    made = make_plan(inspect(small_sample(name)), Recipe("gguf"))
    experts = [step for step in made.steps if "experts." in step.name and isinstance(step, Transcode)]
    experts = [step for step in experts if not step.name.endswith("bias") and "shared" not in step.name]
    fates = {step.target.fate(step.source) for step in experts} or {"lossless"}
    labels = {step.target.label for step in experts} or {"bf16"}
    assert rows == [[made.facts["architecture"], *labels, *map(WORDS.get, fates)]]


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_can_be_made_of_an_encoding_is_in_the_table(name: str) -> None:
    def fate(to: str) -> str:
        target = next(iter(TARGETS[to].values())).format
        return WORDS[target.fit(ENCODINGS[name], 256, 256, mse=False).fate(ENCODINGS[name])]

    (row,) = [row for row in tables() if row[0] == name]
    assert row[1:] == [fate(to) for to in TO]


def test_gptq_has_the_outcomes_of_packed_integers() -> None:
    gptq, packed = Gptq(32, scale_dtype="BF16"), Packed(32)
    for to in TO:
        target = next(iter(TARGETS[to].values())).format
        fates = {target.fit(source, 256, 256, mse=False).fate(source) for source in (gptq, packed)}
        assert len(fates) == 1, to
