"""transformers starts from samples as they are: no flag, nothing but what their config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import SIZES

from kconvert import Recipe, convert, plan
from kconvert.models.catalogue import load_manifest, load_manifests
from kconvert.targets.sample import SampleRecipe, plan_synthetic

transformers = pytest.importorskip("transformers")

CAUSAL, SEEING = "AutoModelForCausalLM", "AutoModelForImageTextToText"
STARTING = {
    **dict.fromkeys(("deepseek-v3", "deepseek-v4", "deepseek-v4-0731", "deepseek-v4-base"), CAUSAL),
    **dict.fromkeys(("glm-4-moe", "glm-5", "glm-5.3", "gpt-oss", "kimi-linear", "minimax-m2", "mixtral"), CAUSAL),
    **dict.fromkeys(("qwen3-moe", "qwen3.5-moe", "qwen3.5-moe-fp8", "qwen3.8-moe", "ling-3"), CAUSAL),
    **dict.fromkeys(("kimi-k2.5", "kimi-k2.6", "kimi-k2.7", "minimax-m3", "step-3.7"), SEEING),
}
# Whose code is the release's own, for which a sample has some that stands for it.
TRUSTED = ("kimi-k2-thinking", "kimi-k2-instruct", "step-3")
# See docs/MODELS.md: transformers has no such model (K3, V4.1), no such encoding (ModelOpt's), or no norms in F32 beside FP8.
STOPPED = {"kimi-k3", "deepseek-v4.1", "kimi-k2-thinking-nvfp4", "deepseek-v3.2"}


def written(root: Path, like: str, **sizes: int) -> Path:
    """A sample of these sizes, and of its own ranks of compression."""
    small = {symbol: size for symbol, size in SIZES.items() if symbol not in ("q_rank", "kv_rank")}
    wanted = {k: v for k, v in {**small, **sizes}.items() if k in load_manifest(like).dims}
    convert(plan_synthetic(SampleRecipe(like, wanted)), root)
    return root


def answers(root: Path, kind: str = CAUSAL, **options: Any) -> Any:
    """What is wrong with the names of the tensors, after a forward pass that ends in finite logits."""
    transformers.utils.logging.disable_progress_bar()
    load = getattr(transformers, kind).from_pretrained
    model, report = load(root, dtype=torch.bfloat16, output_loading_info=True, **options)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[7, 42, 99, 3]])).logits
    assert logits.isfinite().all()
    return report["missing_keys"]


def unseeing(missing: Any) -> list[str]:
    """Without those of eyes, which are copied and never made up."""
    return [name for name in missing if "vision" not in name and "projector" not in name]


@pytest.mark.parametrize(("name", "kind"), STARTING.items())
def test_it_starts_without_a_flag(tmp_path: Path, name: str, kind: str) -> None:
    assert not unseeing(answers(written(tmp_path / name, name, layers=4), kind))


@pytest.mark.parametrize("name", TRUSTED)
def test_it_starts_by_the_code_that_it_brings(tmp_path: Path, name: str) -> None:
    assert not answers(written(tmp_path / name, name, layers=4), trust_remote_code=True)


def test_there_is_no_other_model() -> None:
    assert {*STARTING, *TRUSTED, *STOPPED, "generic"} == set(load_manifests())


def test_two_layers_of_a_model_of_two_kinds_are_one_of_each(tmp_path: Path) -> None:
    root = written(tmp_path / "qwen", "qwen3.8-moe", layers=2)
    config = json.loads((root / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention"]
    assert not answers(root)


def test_an_ordinary_number_of_layers_is_the_models_own(tmp_path: Path) -> None:
    config = plan_synthetic(SampleRecipe("qwen3.5-moe", {"layers": 5, "experts": 4})).facts["config"]
    assert config["text_config"]["layer_types"] == [*["linear_attention"] * 3, "full_attention", "linear_attention"]


def test_deepseek_v32_is_the_class_of_its_own_and_starts_once_it_is_no_fp8(tmp_path: Path) -> None:
    """Its norms in F32 beside FP8 are what transformers stumbles over, in the release as well."""
    root = written(tmp_path / "fp8", "deepseek-v3.2")
    assert "auto_map" not in json.loads((root / "config.json").read_text())
    convert(plan(root, Recipe("bf16")), tmp_path / "bf16")
    assert not answers(tmp_path / "bf16")


@pytest.mark.parametrize(
    ("name", "sizes", "rank"),
    [
        ("deepseek-v3", {}, 512),
        ("deepseek-v3", {"layers": 2}, 448),
        ("deepseek-v3", {"layers": 2, "kv_rank": 512}, 512),
        ("kimi-k2-thinking", {"layers": 2}, 512),
        ("glm-5", {"layers": 2}, 512),
        ("kimi-k2-instruct", {"layers": 2}, 448),
    ],
)
def test_a_small_sample_in_blocks_of_fp8_has_a_rank_that_cuts_none_off(
    name: str, sizes: dict[str, int], rank: int
) -> None:
    assert plan_synthetic(SampleRecipe(name, sizes)).facts["config"]["kv_lora_rank"] == rank
