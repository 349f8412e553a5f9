"""transformers, somebody else's code from the file to the logits, sees one and the same model in every lossless form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kconvert import Recipe, convert, plan

transformers = pytest.importorskip("transformers")
SIZES = {
    "layers": 3,
    "experts": 8,
    "hidden": 256,
    "moe_intermediate": 128,
    "intermediate": 512,
    "heads": 4,
    "vocab": 512,
}
EXPERT = "model.layers.1.mlp.experts.5.down_proj"


@pytest.fixture(scope="module")
def forms(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small model: INT4, BF16 made of it, INT4 made of that."""
    root = tmp_path_factory.mktemp("forms")
    forms = {"int4": sample(root / "int4", **SIZES)}
    forms["bf16"], forms["again"] = root / "bf16", root / "again"
    convert(plan(forms["int4"], Recipe("bf16")), forms["bf16"])
    convert(plan(forms["bf16"], Recipe("int4", require_exact=True)), forms["again"])
    return forms


def load(directory: Path, root: Path) -> Any:
    """As the DeepSeek-V3 that it is: Kimi-K2's own model_type needs its authors' code."""
    shutil.copytree(directory, root)
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = "deepseek_v3"
    del config["auto_map"]
    (root / "config.json").write_text(json.dumps(config))
    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(64).view(2, -1) * 17 % 512).logits
    return found


def test_the_logits_of_all_forms_agree_bit_for_bit(forms: dict[str, Path], tmp_path: Path) -> None:
    models = {form: load(directory, tmp_path / form) for form, directory in forms.items()}
    expected = logits(models["bf16"])
    assert expected.isfinite().all()
    assert expected.std() > 0.01
    for model in models.values():
        assert torch.equal(logits(model), expected)


def test_a_sample_starts_as_its_own_config_says(forms: dict[str, Path], tmp_path: Path) -> None:
    """Code of the model's own is what its release has, too; no other flag."""
    expected = logits(load(forms["bf16"], tmp_path / "bf16"))
    for form in ("bf16", "int4"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            forms[form], dtype=torch.bfloat16, trust_remote_code=True, output_loading_info=True
        )
        assert not any(report.values()), report
        assert torch.equal(logits(model), expected)


def test_one_changed_scale_of_an_expert_is_seen_in_the_logits(forms: dict[str, Path], tmp_path: Path, raw: Any) -> None:
    damaged = raw.load(forms["int4"])
    scale = damaged[f"{EXPERT}.weight_scale"]
    scale.data = b"\x00\x40" * (len(scale.data) // 2)
    spoilt = damaged.save(tmp_path / "spoilt")
    assert not torch.equal(logits(load(spoilt, tmp_path / "loaded")), logits(load(forms["bf16"], tmp_path / "bf16")))
