"""gpt-oss: stacked, transposed experts with biases, read and written as transformers does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kconvert import CheckFailed, KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.address import open_checkpoint
from kconvert.targets.sample import SampleRecipe, plan_cut

EXPERTS = "model.layers.1.mlp.experts"
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(small_sample: Callable[[str], Path]) -> Path:
    return small_sample("gpt-oss")


@pytest.fixture(scope="module")
def dense(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gpt-oss") / "bf16"
    convert(plan(source, Recipe("bf16", "mxfp4")), target)
    return target


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(directory: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy with changed tensors, in one shard."""
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    changed = tensors(directory)
    change(changed)
    save_file(changed, target / "model.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(changed, "model.safetensors")}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def test_the_experts_are_weights_with_their_true_number_of_parameters(source: Path) -> None:
    experts = [weight for weight in inspect(source).weights if weight.name == f"{EXPERTS}.gate_up_proj"]
    assert [(w.role, w.rows, w.cols, w.format.label) for w in experts] == [
        ("expert.gate_up", 4 * 2 * 128, 256, "mxfp4 stack")
    ]


def test_the_dense_experts_are_what_transformers_makes_of_the_blocks(source: Path, dense: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    ours, theirs = tensors(dense), tensors(source)
    for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
        wanted = convert_moe_packed_tensors(theirs[f"{name}_blocks"], theirs[f"{name}_scales"])
        assert ours[name].shape == wanted.shape
        assert torch.equal(ours[name].view(torch.int16), wanted.view(torch.int16))
        assert torch.equal(ours[f"{name}_bias"], theirs[f"{name}_bias"])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bytes_with_any_number_of_workers_and_little_memory(
    source: Path, dense: Path, tmp_path: Path, threads: int
) -> None:
    convert(plan(source, Recipe("bf16")), tmp_path / "again", threads=threads, memory=1 << 16)
    for file in dense.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_transformers_gets_the_same_logits_from_both_forms(source: Path, dense: Path) -> None:
    def logits(directory: Path, **options: Any) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)
        with torch.no_grad():
            return model(torch.arange(24).view(1, -1) * 17 % 512).logits

    transformers.utils.logging.disable_progress_bar()
    dequantised = logits(source, quantization_config=transformers.Mxfp4Config(dequantize=True))
    assert torch.equal(logits(dense), dequantised)


def test_a_fault_in_one_expert_is_found_by_verify(source: Path, dense: Path, tmp_path: Path) -> None:
    def swap(found: dict[str, torch.Tensor]) -> None:
        found[f"{EXPERTS}.down_proj"] = found[f"{EXPERTS}.down_proj"][[1, 0, 2, 3]].contiguous()

    with pytest.raises(CheckFailed, match=rf"{EXPERTS}.down_proj' differs at \[0, 0\]"):
        verify(source, rewrite(dense, tmp_path / "swapped", swap))


def test_a_cut_of_either_form_has_the_first_experts(source: Path, dense: Path, tmp_path: Path) -> None:
    for form in (source, dense):
        target = tmp_path / form.name
        convert(plan_cut(open_checkpoint(form), SampleRecipe(sizes={"layers": 2, "experts": 2})), target)
        whole, cut = tensors(form), tensors(target)
        assert cut.keys() < whole.keys()
        for name, tensor in cut.items():
            assert torch.equal(tensor, whole[name][: len(tensor)])
        assert json.loads((target / "config.json").read_text())["num_local_experts"] == 2


def test_the_dense_form_is_complete_and_has_nothing_left_to_convert(dense: Path) -> None:
    assert {weight.format.label for weight in inspect(dense).weights} == {"bf16"}
    with pytest.raises(KconvertError, match="no quantised weights"):
        plan(dense, Recipe("bf16"))


@pytest.mark.parametrize("target", ["int4", "fp8", "mxfp4"])
def test_stacked_experts_go_to_nothing_else(source: Path, dense: Path, target: str) -> None:
    for form in (source, dense):
        with pytest.raises(
            KconvertError, match=r"model.layers.0.mlp.experts.down_proj' is a stack .* goes to bf16 only"
        ):
            plan(form, Recipe(target))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("down_proj_scales", lambda t: None, "it needs either blocks and scales"),
        ("down_proj_blocks", lambda t: t[:2].contiguous(), r"is U8 \[2, .* has U8 \[4, "),
        ("gate_up_proj_blocks", lambda t: t[..., :8].contiguous(), r"is U8 \[4, 256, 8, 8\], but a weight"),
        ("gate_up_proj", lambda t: torch.zeros(4, 256, 256, dtype=torch.bfloat16), "it needs either blocks"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    source: Path, tmp_path: Path, name: str, change: Callable[[Any], Any], sentence: str
) -> None:
    def spoil(found: dict[str, torch.Tensor]) -> None:
        changed = change(found.pop(f"{EXPERTS}.{name}", None))
        if changed is not None:
            found[f"{EXPERTS}.{name}"] = changed

    with pytest.raises(KconvertError, match=sentence) as refusal:
        inspect(rewrite(source, tmp_path / "spoilt", spoil))
    assert EXPERTS in str(refusal.value)


def test_an_exponent_of_nan_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    def spoil(found: dict[str, torch.Tensor]) -> None:
        found[f"{EXPERTS}.down_proj_scales"][3, 5, 1] = 255

    spoilt = rewrite(source, tmp_path / "spoilt", spoil)
    with pytest.raises(KconvertError, match=rf"{EXPERTS}.down_proj_scales' is not finite at \[3, 5, 1\]"):
        convert(plan(spoilt, Recipe("bf16")), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))
