"""transformers starts from samples as they are: no flag, nothing but what their config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import SIZES

from kconvert import Recipe, convert, plan
from kconvert.models.catalogue import load_manifest
from kconvert.targets.sample import SampleRecipe, plan_synthetic

transformers = pytest.importorskip("transformers")


def written(root: Path, like: str, **sizes: int) -> Path:
    wanted = {**SIZES, **sizes}
    convert(
        plan_synthetic(SampleRecipe(like, {k: v for k, v in wanted.items() if k in load_manifest(like).dims})), root
    )
    return root


def answers(root: Path, kind: str = "AutoModelForCausalLM") -> Any:
    """What is wrong with the names of the tensors, after a forward pass that ends in finite logits."""
    transformers.utils.logging.disable_progress_bar()
    model, report = getattr(transformers, kind).from_pretrained(root, dtype=torch.bfloat16, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[7, 42, 99, 3]])).logits
    assert logits.isfinite().all()
    return report["missing_keys"]


def test_two_layers_of_a_model_of_two_kinds_are_one_of_each(tmp_path: Path) -> None:
    root = written(tmp_path / "qwen", "qwen3.8-moe", layers=2)
    config = json.loads((root / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention"]
    assert not answers(root)


def test_an_ordinary_number_of_layers_is_the_models_own(tmp_path: Path) -> None:
    config = plan_synthetic(SampleRecipe("qwen3.5-moe", {"layers": 5, "experts": 4})).facts["config"]
    assert config["text_config"]["layer_types"] == [*["linear_attention"] * 3, "full_attention", "linear_attention"]


def test_heads_of_either_kind_of_layer_are_shared_out_among_the_groups(tmp_path: Path) -> None:
    missing = answers(written(tmp_path / "step", "step-3.7", layers=4), "AutoModelForImageTextToText")
    assert not [name for name in missing if "language_model" in name]  # its eyes are not made up


def test_deepseek_v32_is_the_class_of_its_own_and_starts_once_it_is_no_fp8(tmp_path: Path) -> None:
    """Its norms in F32 beside FP8 are what transformers stumbles over, in the release as well."""
    root = written(tmp_path / "fp8", "deepseek-v3.2", kv_rank=64)
    assert "auto_map" not in json.loads((root / "config.json").read_text())
    convert(plan(root, Recipe("bf16")), tmp_path / "bf16")
    assert not answers(tmp_path / "bf16")
