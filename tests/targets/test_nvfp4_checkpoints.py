"""Checkpoints in NVFP4: what engines fuse shares its global scale, what config.json says, and `verify` sees what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sizes import SIZES

from kconvert import CheckFailed, KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.proof.parity.compare import Standard
from kconvert.targets.sample import SampleRecipe, plan_synthetic

LAYOUTS = pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
GLOBAL = {"compressed-tensors": "weight_global_scale", "modelopt": "weight_scale_2"}
EXPERT = "model.layers.1.mlp.experts.0"


@pytest.fixture
def source(int4: Path) -> Path:
    return int4


def written(root: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(root.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@LAYOUTS
@pytest.mark.parametrize("scales", ["amax", "mse"])
def test_experts_become_nvfp4_and_verify_agrees(source: Path, tmp_path: Path, layout: str, scales: str) -> None:
    convert(plan(source, Recipe("nvfp4", layout=layout, scales=scales)), tmp_path / "out")
    verify(source, tmp_path / "out")
    model = inspect(tmp_path / "out")
    assert {w.format.label for w in model.weights if w.role.startswith("expert")} == {"nvfp4"}
    assert {w.format.label for w in model.weights if not w.role.startswith("expert")} == {"bf16"}


@LAYOUTS
def test_gate_and_up_share_their_global_scale_which_is_a_power_of_two(
    source: Path, tmp_path: Path, layout: str
) -> None:
    convert(plan(source, Recipe("nvfp4", layout=layout)), tmp_path / "out")
    tensors = written(tmp_path / "out")
    shared = 0
    for name, tensor in tensors.items():
        if name.endswith(GLOBAL[layout]):
            assert float(torch.frexp(tensor).mantissa) == 0.5
            shared += 1
        if name.endswith(f"gate_proj.{GLOBAL[layout]}"):
            assert torch.equal(tensor, tensors[name.replace("gate_proj", "up_proj")])
    assert shared


def test_the_larger_of_gate_and_up_decides(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("bf16")), tmp_path / "bf16")
    (path,) = (tmp_path / "bf16").glob("*.safetensors")
    tensors = load_file(path)
    tensors[f"{EXPERT}.up_proj.weight"][3, 5] = 1000.0
    save_file(tensors, path, {"format": "pt"})
    convert(plan(tmp_path / "bf16", Recipe("nvfp4", layout="modelopt")), tmp_path / "out")
    scales = {name: float(tensor) for name, tensor in written(tmp_path / "out").items() if "weight_scale_2" in name}
    assert scales[f"{EXPERT}.gate_proj.weight_scale_2"] == scales[f"{EXPERT}.up_proj.weight_scale_2"] == 0.5
    assert scales[f"{EXPERT}.down_proj.weight_scale_2"] < 0.1
    verify(tmp_path / "bf16", tmp_path / "out")


def test_threads_memory_and_a_choice_of_weights_change_no_byte(source: Path, tmp_path: Path) -> None:
    recipe = Recipe("nvfp4", layout="modelopt")
    convert(plan(source, recipe), tmp_path / "one", threads=1)
    convert(plan(source, recipe), tmp_path / "many", threads=9, memory=1 << 20)
    gates = Recipe("nvfp4", layout="modelopt", include=("*gate_proj*",))
    convert(plan(source, gates), tmp_path / "gates")
    one, many, some = (written(tmp_path / name) for name in ("one", "many", "gates"))
    assert all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), many[name].reshape(-1).view(torch.uint8)) for name in one
    )
    assert all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), some[name].reshape(-1).view(torch.uint8)) for name in some
    )


def test_modelopt_says_the_same_in_both_files_and_has_scales_of_activations(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("nvfp4", layout="modelopt")), tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert (table["quant_method"], table["quant_algo"]) == ("modelopt", "NVFP4")
    assert beside["producer"]["name"] == "modelopt"
    assert beside["quantization"]["quant_algo"] == "NVFP4"
    assert beside["quantization"]["exclude_modules"] == table["ignore"]
    tensors = written(tmp_path / "out")
    assert float(tensors[f"{EXPERT}.gate_proj.input_scale"]) == 1.0
    assert tensors[f"{EXPERT}.gate_proj.input_scale"].shape == ()
    quantised = {name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")}
    assert {f"{name}.input_scale" for name in quantised} == {name for name in tensors if "input_scale" in name}


def test_measured_scales_of_activations_go_to_modelopt_as_their_inverses(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("nvfp4")), tmp_path / "ct")
    (path,) = (tmp_path / "ct").glob("*.safetensors")
    tensors = load_file(path)
    scales = {"gate_proj": 3.1, "up_proj": 3.1, "down_proj": float("inf")}
    for name, value in scales.items():
        tensors[f"{EXPERT}.{name}.input_global_scale"] = torch.tensor([value])
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((tmp_path / "ct" / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (tmp_path / "ct" / "model.safetensors.index.json").write_text(json.dumps(index))
    made = plan(tmp_path / "ct", Recipe("nvfp4", layout="modelopt"))
    assert made.facts["notes"] == [
        "input_scale of 3 weights is 1 / input_global_scale in F32, of which the inverse is another number for one in six; "
        "or 1 where that is none, as beside an expert that no token reached"
    ]
    assert not made.facts["dropped"]
    convert(made, tmp_path / "out")
    verify(tmp_path / "ct", tmp_path / "out")
    out = written(tmp_path / "out")
    assert torch.equal(out[f"{EXPERT}.up_proj.input_scale"], 1 / torch.tensor(3.1))
    assert float(out[f"{EXPERT}.down_proj.input_scale"]) == 1.0
    assert float(out["model.layers.2.mlp.experts.0.up_proj.input_scale"]) == 1.0

    (path,) = (tmp_path / "out").glob("*.safetensors")
    out[f"{EXPERT}.up_proj.input_scale"] = torch.tensor(1.0)
    save_file(out, path, {"format": "pt"})
    with pytest.raises(CheckFailed, match=r"up_proj.input_scale' is not 1, nor what the source has measured"):
        verify(tmp_path / "ct", tmp_path / "out")


def test_a_sample_in_nvfp4_is_as_modelopt_writes_it(tmp_path: Path) -> None:
    sizes = {**SIZES, "experts": 2}
    convert(plan_synthetic(SampleRecipe("kimi-k2-thinking-nvfp4", sizes)), tmp_path / "source")
    tensors = written(tmp_path / "source")
    up = f"{EXPERT}.up_proj"
    assert float(tensors[f"{up}.input_scale"]) == 1.0
    assert torch.equal(tensors[f"{up}.weight_scale_2"], tensors[f"{EXPERT}.gate_proj.weight_scale_2"])
    assert f"{up.replace('experts.0', 'shared_experts')}.weight_scale" in tensors
    convert(plan(tmp_path / "source", Recipe("bf16")), tmp_path / "bf16")
    verify(tmp_path / "source", tmp_path / "bf16")


def test_compressed_tensors_says_nothing_of_activations(source: Path, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    convert(plan(source, Recipe("nvfp4")), tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in table.items() if k != "quant_method"})
    (group,) = config.config_groups.values()
    assert config.format == "nvfp4-pack-quantized"
    assert group.input_activations is None
    assert group.weights is not None
    assert (group.weights.strategy, group.weights.group_size) == ("tensor_group", 16)


@pytest.mark.parametrize(("exponent", "code", "is_finite"), [(253, 3, True), (253, 7, False), (255, 1, False)])
def test_mxfp4_whose_values_are_not_finite_is_refused_by_name(
    source: Path, tmp_path: Path, exponent: int, code: int, is_finite: bool
) -> None:
    convert(plan(source, Recipe("mxfp4")), tmp_path / "mxfp4")
    (path,) = (tmp_path / "mxfp4").glob("*.safetensors")
    tensors = load_file(path)
    tensors[f"{EXPERT}.up_proj.weight_scale"][:] = exponent
    tensors[f"{EXPERT}.up_proj.weight_packed"][:] = code
    tensors[f"{EXPERT}.gate_proj.weight_scale"][:] = exponent - 5
    save_file(tensors, path, {"format": "pt"})
    made = plan(tmp_path / "mxfp4", Recipe("nvfp4"))
    if is_finite:
        convert(made, tmp_path / "out")
        verify(tmp_path / "mxfp4", tmp_path / "out")
        return
    with pytest.raises(
        KconvertError, match=rf"{EXPERT}.up_proj(' .*it has a value that is not finite|.weight_scale' is not finite)"
    ):
        convert(made, tmp_path / "out")


@LAYOUTS
def test_mxfp4_becomes_nvfp4_exactly_and_comes_back(source: Path, tmp_path: Path, layout: str) -> None:
    convert(plan(source, Recipe("mxfp4")), tmp_path / "mxfp4")
    lost = convert(plan(tmp_path / "mxfp4", Recipe("nvfp4", layout=layout, require_exact=True)), tmp_path / "nvfp4")
    assert not lost
    verify(tmp_path / "mxfp4", tmp_path / "nvfp4")
    before, after = written(tmp_path / "mxfp4"), written(tmp_path / "nvfp4")
    codes = "weight" if layout == "modelopt" else "weight_packed"
    assert torch.equal(before[f"{EXPERT}.up_proj.weight_packed"], after[f"{EXPERT}.up_proj.{codes}"])
    convert(plan(tmp_path / "mxfp4", Recipe("bf16")), tmp_path / "a")
    convert(plan(tmp_path / "nvfp4", Recipe("bf16")), tmp_path / "b")
    verify(tmp_path / "a", tmp_path / "b")


def test_groups_of_mxfp4_that_do_not_fit_are_counted_and_refused_by_name(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("mxfp4")), tmp_path / "mxfp4")
    (path,) = (tmp_path / "mxfp4").glob("*.safetensors")
    tensors = load_file(path)
    name = f"{EXPERT}.gate_proj"
    tensors[f"{name}.weight_scale"][2, 1] = 60
    tensors[f"{name}.weight_packed"][2, 16:32] = 0x11
    save_file(tensors, path, {"format": "pt"})
    lost = convert(plan(tmp_path / "mxfp4", Recipe("nvfp4")), tmp_path / "out")
    assert lost == {name: 2}
    verify(tmp_path / "mxfp4", tmp_path / "out")
    with pytest.raises(KconvertError, match=f"{name}.*2 of its groups have values that no codes"):
        convert(plan(tmp_path / "mxfp4", Recipe("nvfp4", require_exact=True)), tmp_path / "refused")


def test_large_scales_over_nothing_but_zeros_leave_the_others_exact(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("mxfp4")), tmp_path / "mxfp4")
    (path,) = (tmp_path / "mxfp4").glob("*.safetensors")
    tensors = load_file(path)
    tensors[f"{EXPERT}.gate_proj.weight_scale"][0, 0] = 200
    tensors[f"{EXPERT}.gate_proj.weight_packed"][0, :16] = 0
    save_file(tensors, path, {"format": "pt"})
    lost = convert(plan(tmp_path / "mxfp4", Recipe("nvfp4", require_exact=True)), tmp_path / "out")
    assert not lost
    verify(tmp_path / "mxfp4", tmp_path / "out")


def test_the_smallest_scale_of_mxfp4_is_kept_too(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("mxfp4")), tmp_path / "mxfp4")
    (path,) = (tmp_path / "mxfp4").glob("*.safetensors")
    tensors = load_file(path)
    for name in ("gate_proj", "up_proj"):
        tensors[f"{EXPERT}.{name}.weight_scale"].zero_()  # 2^-127
    save_file(tensors, path, {"format": "pt"})
    assert not convert(plan(tmp_path / "mxfp4", Recipe("nvfp4", require_exact=True)), tmp_path / "out")
    verify(tmp_path / "mxfp4", tmp_path / "out")


def test_one_dialect_becomes_the_other_without_a_change_of_codes(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("nvfp4")), tmp_path / "theirs")
    lost = convert(plan(tmp_path / "theirs", Recipe("nvfp4", layout="modelopt", require_exact=True)), tmp_path / "ours")
    assert not lost
    verify(tmp_path / "theirs", tmp_path / "ours")
    verify(source, tmp_path / "ours")


def test_a_dialect_whose_inverse_is_not_exact_is_counted(source: Path, tmp_path: Path) -> None:
    convert(plan(source, Recipe("nvfp4")), tmp_path / "theirs")
    (path,) = (tmp_path / "theirs").glob("*.safetensors")
    tensors = load_file(path)
    for factor, (name, tensor) in enumerate(tensors.items()):
        if name.endswith("weight_global_scale"):
            tensor.mul_(1 + factor / 997)
    save_file(tensors, path, {"format": "pt"})
    made = plan(tmp_path / "theirs", Recipe("nvfp4", layout="modelopt"))
    lost = convert(made, tmp_path / "ours")
    assert isinstance(lost, dict)
    assert list(made.facts["recovered"]) == ["nvfp4 -> nvfp4"]
    verify(tmp_path / "theirs", tmp_path / "ours")


@LAYOUTS
@pytest.mark.parametrize("part", ["codes", "scale", "global", "input"])
def test_verify_finds_what_is_wrong(source: Path, tmp_path: Path, layout: str, part: str) -> None:
    convert(plan(source, Recipe("nvfp4", layout=layout)), tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(path)
    codes = "weight" if layout == "modelopt" else "weight_packed"
    if (part, layout) == ("input", "compressed-tensors"):
        pytest.skip("it says nothing of activations")
    parts = {"codes": codes, "scale": "weight_scale", "global": GLOBAL[layout], "input": "input_scale"}
    name = f"{EXPERT}.down_proj.{parts[part]}"
    if part in ("global", "input"):
        tensors[name] *= 2
    else:
        tensors[name].view(torch.uint8)[7, 3] ^= 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckFailed, match="down_proj"):
        verify(source, tmp_path / "out")


@LAYOUTS
def test_verify_finds_a_gate_whose_global_scale_is_not_that_of_up(source: Path, tmp_path: Path, layout: str) -> None:
    convert(plan(source, Recipe("nvfp4", layout=layout)), tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(path)
    gate = f"{EXPERT}.gate_proj"
    tensors[f"{gate}.{GLOBAL[layout]}"] *= 2 if layout == "modelopt" else 0.5
    tensors[f"{gate}.weight_scale"] = (tensors[f"{gate}.weight_scale"].float() / 2).to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})  # every value as it was
    with pytest.raises(CheckFailed, match=rf"up_proj.{GLOBAL[layout]}' differs from '{gate}.* keep one scale"):
        verify(source, tmp_path / "out")
    assert len(verify(source, tmp_path / "out", keep_going=True).faults) == 1
    verify(source, tmp_path / "out", standard=Standard(exact=False))
    other = next(name for name in GLOBAL if name != layout)
    convert(plan(tmp_path / "out", Recipe("nvfp4", layout=other)), tmp_path / "kept")
    verify(tmp_path / "out", tmp_path / "kept")  # as its source has it
