"""NVFP4 in GGUF: the source's codes and scales, held to gguf's own dequantiser and to what llama.cpp's converter writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf_writing import write
from safetensors.torch import load_file, save_file

from kconvert import CheckFailed, KconvertError, Recipe, convert, plan, verify
from kconvert.targets.mixed.rules import read_mix
from kconvert.targets.sample import SampleRecipe, plan_synthetic

Source = Callable[[str], Path]
ToGguf = Callable[..., Any]
LAYOUTS = pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
NAMES = {
    "modelopt": ("weight", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_global_scale"),
}
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj"
FACTOR = 0.0123  # no power of two


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(root.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def edit(root: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    for path in root.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    return root


@pytest.fixture
def nvfp4(source: Source, tmp_path: Path) -> Callable[..., Path]:
    """`nvfp4(layout, model)`: its experts in NVFP4, or all that `rules` of a recipe say."""

    def make(layout: str, name: str = "qwen3-moe", rules: str = '"expert" = "nvfp4"') -> Path:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(f'layout = "{layout}"\n\n[encodings]\n{rules}\n')
        convert(plan(source(name), Recipe("recipe", mix=read_mix(str(recipe)))), tmp_path / "nvfp4")
        return tmp_path / "nvfp4"

    return make


def blocks_of(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes u8 [rows, cols / 2] and scales [rows, cols / 16] as llama.cpp's converter packs them."""
    rows, groups = scale.shape
    nibbles = torch.stack([codes & 15, codes >> 4], -1).view(rows, groups, 16)
    packed = nibbles[..., :8] | nibbles[..., 8:] << 4
    scales = scale.view(torch.uint8) & 0x7F
    return torch.cat([scales.view(rows, -1, 4), packed.view(rows, -1, 32)], -1).flatten(1)


@LAYOUTS
def test_experts_keep_their_codes_and_scales_and_have_their_factors_beside_them(
    nvfp4: Callable[..., Path], to_gguf: ToGguf, layout: str
) -> None:
    root = nvfp4(layout)
    read, tensors = to_gguf(root), tensors_of(root)
    codes, scale = NAMES[layout]
    for layer in range(2):
        for projection in ("gate", "up", "down"):
            stem = f"blk.{layer}.ffn_{projection}_exps"
            experts = [EXPERT.format(layer, n, projection) for n in range(4)]
            wanted = torch.stack([blocks_of(tensors[f"{e}.{codes}"], tensors[f"{e}.weight_scale"]) for e in experts])
            assert read.type(f"{stem}.weight") == "NVFP4"
            assert (read.tensors[f"{stem}.weight"].data == wanted.numpy()).all()
            factors = torch.stack([tensors[f"{e}.{scale}"].reshape(()) for e in experts])
            factors = factors if layout == "modelopt" else 1 / factors
            assert (read.values(f"{stem}.scale") == factors.numpy()).all()
    assert read["general.file_type"] == 39


@LAYOUTS
def test_verify_finds_every_value_and_a_factor_that_is_off_by_a_bit(
    nvfp4: Callable[..., Path], to_gguf: ToGguf, tmp_path: Path, layout: str
) -> None:
    root = nvfp4(layout)
    read = to_gguf(root)
    verify(root, tmp_path / "gguf")
    tensor = read.tensors["blk.1.ffn_up_exps.scale"]
    with open(read.files[0], "r+b") as file:
        file.seek(int(tensor.data_offset) + 8)
        byte = file.read(1)[0]
        file.seek(int(tensor.data_offset) + 8)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckFailed, match=r"ffn_up_exps.weight\[2\]' differs"):
        verify(root, tmp_path / "gguf")


def test_values_are_gguf_s_times_the_factor(nvfp4: Callable[..., Path], to_gguf: ToGguf, tmp_path: Path) -> None:
    root = nvfp4("modelopt")
    read = to_gguf(root)
    values = read.values("blk.0.ffn_down_exps.weight") * read.values("blk.0.ffn_down_exps.scale")[:, None, None]
    convert(plan(root, Recipe("bf16")), tmp_path / "bf16")
    plain = tensors_of(tmp_path / "bf16")
    expected = torch.stack([plain[f"{EXPERT.format(0, n, 'down')}.weight"] for n in range(4)])
    assert torch.equal(torch.from_numpy(values).bfloat16(), expected)


def test_a_factor_that_is_no_power_of_two_is_kept_to_the_bit(
    nvfp4: Callable[..., Path], to_gguf: ToGguf, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_2")]:
            tensors[name] = tensors[name] * 0 + FACTOR

    root = edit(nvfp4("modelopt"), change)
    read = to_gguf(root, require_exact=True)
    assert (read.values("blk.0.ffn_up_exps.scale") == np.float32(FACTOR)).all()
    verify(root, tmp_path / "gguf")


def test_a_global_scale_whose_inverse_changes_values_is_counted_or_refused(
    nvfp4: Callable[..., Path], kconvert: Any, tmp_path: Path
) -> None:
    weight = EXPERT.format(1, 2, "up")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        """1.125 / it lies between two numbers of bf16, 1.125 times its inverse a bit above."""
        tensors[f"{weight}.weight_global_scale"][:] = float.fromhex("0x1.bd7c86p-1")
        tensors[f"{weight}.weight_scale"].view(torch.uint8).fill_(0x38)  # 1
        tensors[f"{weight}.weight_scale"].view(torch.uint8)[5, :3] = 0x39
        tensors[f"{weight}.weight_packed"].fill_(0x22)  # 1

    root = edit(nvfp4("compressed-tensors"), change)
    assert convert(plan(root, Recipe("gguf")), tmp_path / "out") == {weight: 3}
    found = verify(root, tmp_path / "out")
    assert {c.name: c.changed for c in found.comparisons if c.changed} == {weight: 3}
    assert f"3 groups in 1 weight, as planned; first in '{weight}'" in " ".join(found.notes)
    said = kconvert("convert", root, tmp_path / "said", "--to", "gguf").stdout
    assert "1 / global scale, in F32, changes values of 3 groups in 1 weight" in said
    with pytest.raises(KconvertError, match=rf"{weight}.*3 of its groups have other values by 1 / global scale"):
        convert(plan(root, Recipe("gguf", require_exact=True)), tmp_path / "exact")


def test_attention_and_head_have_a_factor_of_their_own(
    nvfp4: Callable[..., Path], to_gguf: ToGguf, tmp_path: Path
) -> None:
    root = nvfp4("modelopt", rules='"attention" = "nvfp4"\n"lm_head" = "nvfp4"\n"expert" = "nvfp4"')
    read, tensors = to_gguf(root), tensors_of(root)
    for ours, theirs in (("blk.1.attn_q", "model.layers.1.self_attn.q_proj"), ("output", "lm_head")):
        if f"{theirs}.weight_scale_2" in tensors:
            wanted = blocks_of(tensors[f"{theirs}.weight"], tensors[f"{theirs}.weight_scale"])
            assert (read.tensors[f"{ours}.weight"].data == wanted.numpy()).all()
            assert list(read.tensors[f"{ours}.scale"].shape) == [1]
            assert read.values(f"{ours}.scale")[0] == tensors[f"{theirs}.weight_scale_2"]
    assert read.type("blk.1.attn_output.weight") == "NVFP4"
    verify(root, tmp_path / "gguf")


def test_zeros_keep_their_signs_also_under_a_scale_of_minus_zero(
    nvfp4: Callable[..., Path], to_gguf: ToGguf, tmp_path: Path
) -> None:
    weight = EXPERT.format(0, 3, "gate")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{weight}.weight"][0] = 0x80 | 0x01
        tensors[f"{weight}.weight_scale"].view(torch.uint8)[0, :2] = torch.tensor([0x80, 0x00], dtype=torch.uint8)

    root = edit(nvfp4("modelopt"), change)
    read = to_gguf(root)
    verify(root, tmp_path / "gguf")
    assert (read.tensors["blk.0.ffn_gate_exps.weight"].data[3, 0, :2] == 0).all()


@pytest.mark.parametrize(("code", "fault"), [(0x7F, "is not finite"), (0xB8, "is negative")])
def test_a_scale_that_the_blocks_cannot_say_is_refused_by_name(
    nvfp4: Callable[..., Path], tmp_path: Path, code: int, fault: str
) -> None:
    weight = EXPERT.format(1, 0, "down")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{weight}.weight_scale"].view(torch.uint8)[3, 1] = code

    root = edit(nvfp4("modelopt"), change)
    with pytest.raises(KconvertError, match=rf"{weight}.weight_scale' {fault} at \[3, 1\]"):
        convert(plan(root, Recipe("gguf")), tmp_path / "out")


def test_a_model_that_llama_cpp_computes_without_factors_has_its_values_in_bf16(
    nvfp4: Callable[..., Path], to_gguf: ToGguf, kconvert: Any, tmp_path: Path
) -> None:
    root = nvfp4("modelopt", "kimi-k2-thinking")
    read = to_gguf(root, require_exact=True)
    assert read.type("blk.1.ffn_up_exps.weight") == "BF16"
    assert not [name for name in read.tensors if name.endswith("scale")]
    verify(root, tmp_path / "gguf")
    said = kconvert("convert", root, tmp_path / "said", "--to", "gguf", "--dry-run").stdout
    assert "12 weights in nvfp4 become bf16" in said
    assert "llama.cpp computes this model without the global scales of their blocks" in said


def test_rows_that_are_no_whole_blocks_are_bf16(source: Source, tmp_path: Path, kconvert: Any) -> None:
    sizes = {"layers": 1, "heads": 4, "kv_heads": 2, "head": 32, "experts": 2, "hidden": 128, "vocab": 320}
    convert(plan_synthetic(SampleRecipe("qwen3-moe", {**sizes, "moe_intermediate": 48})), tmp_path / "odd")
    convert(plan(tmp_path / "odd", Recipe("nvfp4")), tmp_path / "nvfp4")
    said = kconvert("convert", tmp_path / "nvfp4", tmp_path / "out", "--to", "gguf").stdout
    assert "2 weights in nvfp4 become bf16" in said
    verify(tmp_path / "nvfp4", tmp_path / "out")


def test_a_file_of_llama_cpp_s_converter_is_the_source_s(
    nvfp4: Callable[..., Path], to_gguf: ToGguf, tmp_path: Path
) -> None:
    """It has the scales of activations beside, [experts], which nobody compares."""
    root = nvfp4("modelopt")
    read = to_gguf(root)

    tensors = {name: (np.array(tensor.data), tensor.tensor_type) for name, tensor in read.tensors.items()}
    for name in [name for name in tensors if name.endswith("_exps.scale")]:
        tensors[name.replace(".scale", ".input_scale")] = np.ones(4, np.float32), Type.F32
    verify(root, write(tmp_path / "theirs.gguf", tensors, "qwen3moe"))
