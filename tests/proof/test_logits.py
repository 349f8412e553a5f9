"""`kconvert verify --logits`: both forms of a small model in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kconvert import KconvertError, Recipe, convert, inspect, plan
from kconvert.cli import main
from kconvert.proof.logits import agreement, compare_logits, overlap
from kconvert.targets.sample import SampleRecipe, plan_synthetic

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["verify", *map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def small(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More experts than a token goes to, so that routers have a choice."""
    return sample(tmp_path_factory.mktemp("logits") / "int4", experts=16, layers=3)


def test_a_lossless_conversion_has_the_same_logits(small: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    convert(plan(small, Recipe("bf16")), tmp_path / "bf16")
    result = run(small, tmp_path / "bf16", "--logits", "--tokens", 32)
    assert result.exit_code == 0, result.stderr
    assert "max abs 0, KL 0, same top 1 100.00%, 100.00% of the routed experts in common" in result.stdout


def test_a_lossy_one_has_others_and_the_report_says_what_to_make_of_them(
    small: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    convert(plan(small, Recipe("mxfp4")), tmp_path / "mxfp4")
    result = run(small, tmp_path / "mxfp4", "--logits", "--report", tmp_path / "report.json")
    assert result.exit_code == 0, result.stderr
    assert "compare the weights, or the logits with the source's routing" in result.stdout
    logits = json.loads((tmp_path / "report.json").read_text())["logits"]
    assert logits["tokens"] == 128
    assert 0.3 < logits["experts"] < 1
    assert 0 < logits["routed"]["kl"] < logits["free"]["kl"]
    assert logits["free"]["max_abs"] > 0


def test_the_logits_are_those_that_transformers_computes(small: Path, tmp_path: Path) -> None:
    """From the BF16 checkpoint, loaded by transformers itself."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    convert(plan(small, Recipe("bf16")), tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    theirs = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "bf16",
        config=DeepseekV3Config.from_dict({**config, "model_type": "deepseek_v3"}),
        dtype=torch.bfloat16,
    )
    ids = torch.randint(512, (8,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids.unsqueeze(0), use_cache=False).logits[0].float()

    from kconvert.proof.logits import _run

    found, routing = _run(inspect(small), ids)

    assert torch.equal(expected, found)
    assert [tuple(chosen.shape) for chosen, _ in routing] == [(8, 8), (8, 8)]


@pytest.mark.parametrize("like", ["gpt-oss", "kimi-k2.5", "qwen3-moe", "mixtral"])
def test_other_families_are_run_by_their_own_code(tmp_path: Path, like: str) -> None:
    """Stacked and transposed experts, a language model within another, routers with other names for their choice."""
    sizes = {"layers": 2, "experts": 4, "hidden": 64, "vocab": 128}
    convert(plan_synthetic(SampleRecipe(like, sizes)), tmp_path / "source")
    source = inspect(tmp_path / "source")
    report = compare_logits(source, source, tokens=8)
    assert (report.free.max_abs, report.free.top1, report.experts) == (0, 1, 1)
    assert report.routed is not None


def test_agreement_is_what_its_words_say() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 2.5], [4.0, 3.0]])
    found = agreement(a, b)
    expected = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")
    assert (found.max_abs, found.top1) == (4.0, 0.5)
    assert found.kl == pytest.approx(float(expected))


def test_overlap_counts_experts_in_any_order() -> None:
    one = [(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2))]
    two = [(torch.tensor([[1, 0], [3, 5]]), torch.ones(2, 2))]
    assert overlap(one, two) == 0.75
    assert overlap([], []) is None


def test_a_model_that_transformers_does_not_know_is_said_to_be_one(int4_copy: Path, raw: Any) -> None:
    checkpoint = raw.load(int4_copy)
    checkpoint.config["architectures"] = ["NoSuchModel"]
    checkpoint.save()
    with pytest.raises(KconvertError, match="NoSuchModel"):
        compare_logits(inspect(int4_copy), inspect(int4_copy))


@pytest.mark.parametrize("architectures", [None, [], {"a": 1}, "DeepseekV3ForCausalLM"])
def test_a_config_json_that_names_no_architecture_is_said_to(int4_copy: Path, raw: Any, architectures: Any) -> None:
    checkpoint = raw.load(int4_copy)
    checkpoint.config["architectures"] = architectures
    checkpoint.save()
    with pytest.raises(KconvertError, match=r"its config\.json names no architecture, so no logits are compared"):
        compare_logits(inspect(int4_copy), inspect(int4_copy))


def test_a_text_that_cannot_be_tokenised_is_one_sentence(
    small: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tmp_path / "text").write_text("hello")
    result = run(small, small, "--logits", "--text", tmp_path / "text")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "--text" in result.stderr
