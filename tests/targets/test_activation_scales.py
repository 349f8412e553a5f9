"""Scales of activations that somebody has measured go from one dialect of NVFP4 to the other, and `verify` misses none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from kconvert import CheckFailed, KconvertError, Recipe, convert, plan, verify
from kconvert.cli import main
from kconvert.targets.mixed.rules import read_mix

EXPERT = "model.layers.1.mlp.experts.0"
SCALES = (2.0**-9, 0.0015, float("inf"))  # of which the second does not come back from 1 / it
Edit = Callable[[dict[str, torch.Tensor]], None]


def edited(root: Path, edit: Edit) -> Path:
    """The checkpoint after a change to its tensors, which lie in one file."""
    (path,) = root.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, path.name)}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def written(root: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in root.glob("*.safetensors") for name, tensor in load_file(path).items()}


def table(root: Path) -> dict[str, dict[str, dict[str, object]]]:
    read: dict[str, dict[str, dict[str, object]]] = json.loads((root / "config.json").read_text())[
        "quantization_config"
    ]
    return read


@pytest.fixture
def modelopt(int4: Path, tmp_path: Path) -> Path:
    """NVFP4 as ModelOpt has it, calibrated, with an expert that no token reached."""

    def measure(tensors: dict[str, torch.Tensor]) -> None:
        for number, name in enumerate(sorted(name for name in tensors if name.endswith("input_scale"))):
            tensors[name] = torch.tensor(SCALES[number % 3])

    convert(plan(int4, Recipe("nvfp4", layout="modelopt")), tmp_path / "modelopt")
    return edited(tmp_path / "modelopt", measure)


def test_they_go_to_compressed_tensors_as_its_own_converter_has_them(modelopt: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4")
    made = plan(modelopt, Recipe("nvfp4", layout="compressed-tensors"))
    assert made.facts["notes"] == [
        "input_global_scale of 24 weights is 1 / input_scale in F32, of which the inverse is another number for one in six; "
        "or 1 where that is none, as beside an expert that no token reached"
    ]
    assert not made.facts["dropped"]
    convert(made, tmp_path / "out")
    assert verify(modelopt, tmp_path / "out").faults == ()
    theirs = library.ModelOptNvfp4Converter(targets=["re:.*experts.*"], ignore=["re:.*shared.*"]).process(
        {name: tensor for name, tensor in written(modelopt).items() if ".experts." in name}
    )
    ours = written(tmp_path / "out")
    for name in (name for name in theirs if name.endswith("input_global_scale")):
        # Theirs is 0 for an expert that no token reached.
        wanted = theirs[name] if theirs[name] > 0 else torch.tensor(1.0)
        assert ours[name].shape == (1,)
        assert torch.equal(ours[name].view(torch.int32), wanted.reshape(1).view(torch.int32)), name
    assert {name for name in ours if "input_" in name and "norm" not in name} == {n for n in theirs if "input_" in n}


def test_config_json_then_is_the_preset_nvfp4_of_the_library(modelopt: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    convert(plan(modelopt, Recipe("nvfp4")), tmp_path / "out")
    said = {key: value for key, value in table(tmp_path / "out").items() if key != "quant_method"}
    (group,) = quantization.QuantizationConfig(**said).config_groups.values()
    preset = quantization.preset_name_to_scheme("NVFP4", ["Linear"])
    for ours, theirs in ((group.weights, preset.weights), (group.input_activations, preset.input_activations)):
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype"):
            assert getattr(ours, key) == getattr(theirs, key), key


def test_there_and_back_they_are_the_same_or_the_run_ends(modelopt: Path, tmp_path: Path) -> None:
    convert(plan(modelopt, Recipe("nvfp4")), tmp_path / "there")
    convert(plan(tmp_path / "there", Recipe("nvfp4", layout="modelopt")), tmp_path / "back")
    assert verify(tmp_path / "there", tmp_path / "back").faults == ()
    ours, theirs = written(modelopt), written(tmp_path / "back")
    names = [name for name in ours if name.endswith("input_scale")]
    assert all(theirs[name] == ours[name] for name in names if ours[name] == SCALES[0])
    assert all(theirs[name] == 1 for name in names if ours[name] == SCALES[2])
    assert all(theirs[name] != ours[name] for name in names if 0.001 < ours[name] < 0.0018)
    with pytest.raises(
        KconvertError, match=r"its input_scale (inf|0\.00150000001) does not come back from 1 / itself in F32"
    ):
        convert(plan(modelopt, Recipe("nvfp4", require_exact=True)), tmp_path / "exact")


def test_one_that_is_off_or_gone_is_found(modelopt: Path, tmp_path: Path) -> None:
    convert(plan(modelopt, Recipe("nvfp4")), tmp_path / "out")
    name = f"{EXPERT}.up_proj.input_global_scale"

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = (tensors[name].view(torch.int32) + 1).view(torch.float32)

    edited(tmp_path / "out", nudge)
    with pytest.raises(CheckFailed, match=r"up_proj\.input_global_scale' is not 1, nor what the source has measured"):
        verify(modelopt, tmp_path / "out")
    edited(tmp_path / "out", lambda tensors: tensors.pop(name) and None)
    with pytest.raises(CheckFailed, match=r"activations have no input_global_scale, as config_groups\.group_0"):
        verify(modelopt, tmp_path / "out")


def test_where_one_weight_has_none_all_are_left_behind(modelopt: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.up_proj.input_scale"
    edited(modelopt, lambda tensors: tensors.pop(name) and None)
    made = plan(modelopt, Recipe("nvfp4"))
    assert len(made.facts["dropped"]) == 23
    convert(made, tmp_path / "out")
    assert "input_activations" not in table(tmp_path / "out")["config_groups"]["group_0"]
    assert not [name for name in written(tmp_path / "out") if "input_global" in name]
    assert verify(modelopt, tmp_path / "out").faults == ()


def test_copies_keep_theirs_and_config_json_speaks_of_them(modelopt: Path, tmp_path: Path) -> None:
    """A recipe that changes attention and leaves experts as they are."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[encodings]\n"expert" = "nvfp4"\n"attention.o" = "fp8"\n')
    mixed = Recipe("recipe", mix=read_mix(str(recipe)))
    convert(plan(modelopt, Recipe("nvfp4")), tmp_path / "all")
    convert(plan(tmp_path / "all", mixed), tmp_path / "kept")
    groups = table(tmp_path / "kept")["config_groups"].values()
    assert [group["format"] for group in groups if group["input_activations"]["dynamic"] == "local"] == [  # type: ignore[index]
        "nvfp4-pack-quantized"
    ]
    assert len([name for name in written(tmp_path / "kept") if "input_global_scale" in name]) == 24
    assert verify(tmp_path / "all", tmp_path / "kept").faults == ()


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_scale_that_is_none_is_refused(modelopt: Path, tmp_path: Path, value: float) -> None:
    edited(modelopt, lambda tensors: tensors.update({f"{EXPERT}.up_proj.input_scale": torch.tensor(value)}))
    with pytest.raises(
        KconvertError, match=r"experts\.0\.up_proj.*its input_scale (nan|-1) is no scale of activations"
    ):
        convert(plan(modelopt, Recipe("nvfp4")), tmp_path / "out")


@pytest.mark.parametrize("value", [0.0, float("inf"), 1e-42])
def test_one_without_an_inverse_becomes_1_but_where_all_is_to_come_back(
    modelopt: Path, tmp_path: Path, value: float
) -> None:
    def same(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("input_scale")]:
            tensors[name] = torch.tensor(1.0)
        tensors[f"{EXPERT}.up_proj.input_scale"] = torch.tensor(value)

    edited(modelopt, same)
    counted = convert(plan(modelopt, Recipe("nvfp4")), tmp_path / "out")
    assert counted == {f"{EXPERT}.up_proj.input_global_scale": 1}
    assert written(tmp_path / "out")[f"{EXPERT}.up_proj.input_global_scale"].item() == 1
    command = ["convert", str(modelopt), str(tmp_path / "told"), "--to", "nvfp4"]
    said = CliRunner().invoke(main, command, catch_exceptions=False).stdout
    assert f"1 scale of activations became 1, as there is no inverse of what the source has; '{EXPERT}.up_proj" in said
    assert "every value was reproduced exactly" in said
    facts = json.loads(CliRunner().invoke(main, [*command, "--json", "--overwrite"], catch_exceptions=False).stdout)
    assert facts["inexact_groups"] == {}
    with pytest.raises(KconvertError, match="does not come back"):
        convert(plan(modelopt, Recipe("nvfp4", require_exact=True)), tmp_path / "exact")
