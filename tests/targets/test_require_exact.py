"""What `--require-exact` promises: an output with every value of what it was made from, or a sentence that names a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kconvert import KconvertError, Recipe, convert, plan
from kconvert.targets.sample import SampleRecipe, plan_synthetic

EXPERT = "model.layers.1.mlp.experts.1.up_proj"
SIZES = {"layers": 2, "dense_layers": 1, "experts": 2, "hidden": 256, "intermediate": 256, "moe_intermediate": 128}
SMALL = {**SIZES, "vocab": 256, "heads": 2, "q_rank": 64, "kv_rank": 32}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exact") / "fp8"
    convert(plan_synthetic(SampleRecipe("deepseek-v3", SMALL)), root)
    return root


@pytest.mark.parametrize("to", ["int8", "f16"])
def test_an_output_that_rounds_is_refused_before_anything_is_written(fp8: Path, to: str) -> None:
    said = rf"weight 'model\.layers\.\d\.\S+' \(fp8 block 128x128\) may lose values as {to}.*, which --require-exact forbids"
    with pytest.raises(KconvertError, match=said):
        plan(fp8, Recipe(to, require_exact=True))


def test_bf16_of_integers_under_f16_scales_is_refused(int4_copy: Path, raw: Any) -> None:
    checkpoint = raw.load(int4_copy)
    for name in [name for name in checkpoint if name.endswith("weight_scale")]:
        checkpoint[name].dtype, checkpoint[name].data = "F16", b"\x00\x3c" * (len(checkpoint[name].data) // 2)
    checkpoint.save()
    with pytest.raises(KconvertError, match="may lose values as bf16, which --require-exact forbids"):
        plan(int4_copy, Recipe("bf16", require_exact=True))


def test_bf16_of_what_bf16_holds_is_not_refused(fp8: Path) -> None:
    assert not plan(fp8, Recipe("bf16", require_exact=True)).facts["lossy"]


def test_fp8_that_is_as_it_should_be_is_copied(fp8: Path) -> None:
    made = plan(fp8, Recipe("fp8", require_exact=True))
    assert not made.facts["recovered"]
    assert made.facts["lossless"] == plan(fp8, Recipe("fp8")).facts["lossless"]


def test_fp8_by_other_names_is_refused_where_its_scales_are_rounded(fp8: Path, tmp_path: Path) -> None:
    recipe = Recipe("fp8", layout="compressed-tensors", require_exact=True)
    with pytest.raises(
        KconvertError,
        match=r"'model\.\S+' cannot be written as fp8 .* no codes and scale by amax or power of two reproduce",
    ):
        convert(plan(fp8, recipe), tmp_path / "out")


@pytest.mark.parametrize("layout", ["experts", "all"])
def test_bf16_that_was_fp8_by_amax_comes_back(fp8: Path, tmp_path: Path, layout: str) -> None:
    convert(plan(fp8, Recipe("bf16")), tmp_path / "bf16")
    made = plan(tmp_path / "bf16", Recipe("fp8", layout=layout, require_exact=True))
    assert not made.facts["lossy"]
    convert(made, tmp_path / "again")
    convert(plan(tmp_path / "again", Recipe("bf16")), tmp_path / "values")
    had, has = load(tmp_path / "bf16"), load(tmp_path / "values")
    assert all(has[name].view(torch.int16).equal(tensor.view(torch.int16)) for name, tensor in had.items())
    if layout == "all":
        scale = f"{EXPERT}.weight_scale_inv"
        assert load(tmp_path / "again")[scale].equal(load(fp8)[scale])


def load(root: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in root.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("to", ["nvfp4", "mxfp4", "mxfp8"])
def test_what_no_codes_reproduce_is_not_said_to_be_counted_where_it_is_rounded_uncounted(
    int4: Path, tmp_path: Path, to: str
) -> None:
    with pytest.raises(KconvertError, match=r"leave out --require-exact, and such groups are rounded$"):
        convert(plan(int4, Recipe(to, require_exact=True)), tmp_path / to)
