"""transformers reads every lossless form of a Kimi-K2.5, whose modules it calls otherwise, as one and the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import SIZES

from kconvert import Recipe, convert, plan
from kconvert.targets.sample import SampleRecipe, plan_synthetic

transformers = pytest.importorskip("transformers")
# The vision tower keeps its own sizes, which no engine takes from config.json.
WITH_VISION = {**SIZES, "layers": 2, "hidden": 1152, "intermediate": 4352, "heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nested") / "int4"
    convert(plan_synthetic(SampleRecipe("kimi-k2.5", WITH_VISION)), root)
    return root


def load(root: Path, **options: Any) -> Any:
    """The model as its class in transformers reads it, which knows the number of blocks by another key; nothing is missing."""
    config = json.loads((root / "config.json").read_text())
    for table in (config, config["text_config"]):
        table.pop("auto_map", None)
    config["vision_config"]["num_hidden_layers"] = config["vision_config"]["vt_num_hidden_layers"]
    (root / "config.json").write_text(json.dumps(config))
    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        root, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(32).view(2, -1) * 17 % 512).logits
    return found


FORMS = [("int4", ""), ("fp8", "experts"), ("mxfp4", "all"), ("fp8", "compressed-tensors-channel")]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("to", "layout"), FORMS)
def test_codes_give_the_logits_of_their_values(source: Path, tmp_path: Path, to: str, layout: str) -> None:
    if to == "int4":  # made anew, so that its config.json is ours and not the published one
        convert(plan(source, Recipe("bf16")), tmp_path / "values")
        source = tmp_path / "values"
    convert(plan(source, Recipe(to, layout=layout)), tmp_path / "coded")
    convert(plan(tmp_path / "coded", Recipe("bf16")), tmp_path / "plain")
    # Else it rounds activations, too.
    dequantising = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    found = logits(load(tmp_path / "coded", **(dequantising if layout.endswith("channel") else {})))
    assert found.isfinite().all()
    assert found.std() > 0.01
    assert torch.equal(found, logits(load(tmp_path / "plain")))
