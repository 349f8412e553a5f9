"""Whole checkpoints in INT8, MXFP4, MXFP8 and NVFP4, and the less usual spellings of packed integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from spellings import NAMES

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("layout", ["experts", "all"])
@pytest.mark.parametrize("target", ["int8", "mxfp4", "mxfp8"])
def test_every_target_is_read_back_as_itself_and_verified(
    int4: Path, tmp_path: Path, target: str, layout: str, raw: Any
) -> None:
    convert(plan(int4, Recipe(target, "int4", layout=layout)), tmp_path / target)
    model = inspect(tmp_path / target)
    quantised = {weight.role.partition(".")[0] for weight in model.weights if weight.format.label.startswith(target)}
    assert quantised == ({"expert"} if layout == "experts" else {"expert", "shared", "dense", "attention"})
    verify(int4, tmp_path / target)
    table = raw.load(tmp_path / target).config["quantization_config"]
    QuantizationConfig.model_validate(table)
    convert(plan(tmp_path / target, Recipe("bf16")), tmp_path / "bf16")
    verify(tmp_path / target, tmp_path / "bf16")


def respell(
    raw: Any, source: Path, root: Path, scheme: dict[str, Any], make: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> Path:
    """`source` (BF16) with its experts as `make` spells them, and `scheme` in config.json."""
    checkpoint = raw.load(source)
    experts = [name for name in checkpoint if ".experts." in name]
    for name in experts:
        file = checkpoint.file_of(name)
        tensor = checkpoint.pop(name)
        weight = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16).view(tensor.shape)
        for suffix, value in make(weight).items():
            data = bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy())
            checkpoint.put(
                name.replace("weight", suffix), raw.Tensor(NAMES[value.dtype], list(value.shape), data), file
            )
    checkpoint.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": scheme.pop("format"),
        "config_groups": {"group_0": {"targets": [r"re:.*\.experts\..*"], "weights": scheme}},
        "ignore": [],
    }
    return checkpoint.save(root)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_of_every_kind_become_bf16(
    bf16: Path, tmp_path: Path, raw: Any, bits: int, symmetric: bool, strategy: str, dtype: str
) -> None:
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    scheme.update({"group_size": 64} if strategy == "group" else {})
    args = QuantizationArgs(**scheme)

    def make(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.to(DTYPES[dtype]).view(len(weight), -1, 64 if strategy == "group" else weight.shape[1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": groups.flatten(-2), "weight_scale": scale, "weight_zero_point": zero}
        return dict(PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args)))

    source = respell(raw, bf16, tmp_path / "source", {**scheme, "format": "pack-quantized"}, make)
    made = plan(source, Recipe("bf16"))
    assert bool(made.facts["lossless"]) == (dtype == "BF16")
    convert(made, tmp_path / "out")
    report = verify(source, tmp_path / "out")
    assert report.weights > 0


def test_a_model_in_f16_keeps_its_dtype_and_every_value(bf16: Path, tmp_path: Path, raw: Any) -> None:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    quantization = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))
    values: list[torch.Tensor] = []

    def make(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.half().view(len(weight), -1, 32)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), quantization.weights)
        state = {"weight": weight.half(), "weight_scale": scale, "weight_zero_point": zero}
        packed = dict(PackedQuantizationCompressor.compress(state, quantization))
        values.append(PackedQuantizationCompressor.decompress(dict(packed), quantization)["weight"])
        return packed

    source = respell(raw, bf16, tmp_path / "source", {**scheme, "format": "pack-quantized"}, make)
    made = plan(source, Recipe("f16"))
    assert made.facts["lossless"]
    assert not made.facts["lossy"]
    convert(made, tmp_path / "out")
    written = raw.load(tmp_path / "out")
    found = {name: written[name] for name in written if ".experts." in name}
    assert {tensor.dtype for tensor in found.values()} == {"F16"}
    assert sorted(t.data for t in found.values()) == sorted(
        bytes(v.view(torch.uint8).reshape(-1).numpy()) for v in values
    )
    assert verify(source, tmp_path / "out").weights > 0


def test_a_value_beyond_f16_is_an_error_naming_the_weight(int4_copy: Path, tmp_path: Path, raw: Any) -> None:
    checkpoint = raw.load(int4_copy)
    scale = checkpoint[f"{EXPERT}.weight_scale"]
    scale.data = b"\x80\x47" * (len(scale.data) // 2)  # 65536
    checkpoint.save()
    with pytest.raises(
        KconvertError, match=rf"'{EXPERT}' cannot be written as f16: it has a value that F16 cannot hold"
    ):
        convert(plan(int4_copy, Recipe("f16")), tmp_path / "out")


def test_an_old_file_with_plain_zero_points_becomes_bf16(bf16: Path, tmp_path: Path, raw: Any) -> None:
    scheme = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    args = QuantizationArgs(**scheme)

    def make(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.view(len(weight), -1, 32)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        return {**packed, "weight_zero_point": zero.to(torch.int8)}

    source = respell(raw, bf16, tmp_path / "source", {**scheme, "format": "pack-quantized"}, make)
    convert(plan(source, Recipe("bf16")), tmp_path / "out")
    assert verify(source, tmp_path / "out").weights > 0
    spoilt = raw.load(source)
    zero = spoilt[f"{EXPERT}.weight_zero_point"]
    zero.dtype = "U8"
    with pytest.raises(KconvertError, match=rf"'{EXPERT}' cannot be read: its weight_zero_point is U8, not I32 or I8"):
        inspect(spoilt.save(tmp_path / "spoilt"))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_stack_of_experts_becomes_a_stack_in_bf16(tmp_path: Path, raw: Any, bits: int, symmetric: bool) -> None:
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    experts, states = (0.02 * torch.randn(4, 24, 96)).bfloat16(), []
    for weight in experts:
        groups = weight.view(24, -1, 32)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        states.append(PackedQuantizationCompressor.compress(state, scheme))
    values = torch.stack([PackedQuantizationCompressor.decompress(state, scheme)["weight"] for state in states])
    stacks = {suffix: torch.stack([state[suffix] for state in states]) for suffix in states[0]}
    stacks["weight_shape"] = torch.tensor([4, 24, 96])
    tensors = {
        f"experts.up.{suffix}": raw.Tensor(
            NAMES[value.dtype], list(value.shape), bytes(value.reshape(-1).view(torch.uint8).numpy())
        )
        for suffix, value in stacks.items()
    }
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    table = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    source = raw.new(tmp_path / "source", {"model.safetensors": tensors}, {"quantization_config": table}).save()
    convert(plan(source, Recipe("bf16")), tmp_path / "out")
    written = raw.load(tmp_path / "out")["experts.up.weight"]
    assert (written.dtype, written.shape) == ("BF16", [4, 24, 96])
    assert written.data == bytes(values.view(torch.uint8).reshape(-1).numpy())
    verify(source, tmp_path / "out")
    with pytest.raises(KconvertError, match=r"'experts\.up' is a stack of 4 matrices"):
        plan(source, Recipe("int8"))


def test_nvfp4_becomes_bf16(bf16: Path, tmp_path: Path, raw: Any) -> None:
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    args = QuantizationArgs(**scheme, scale_dtype=torch.float8_e4m3fn)

    def make(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.view(len(weight), -1, 16)
        overall = generate_gparam(weight.amin(), weight.amax())
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=overall)
        state = {"weight": weight, "weight_scale": scale, "weight_global_scale": overall}
        state = NVFP4PackedCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        return {**state, "input_global_scale": torch.ones(1)}

    source = respell(raw, bf16, tmp_path / "source", {**scheme, "format": "nvfp4-pack-quantized"}, make)
    convert(plan(source, Recipe("bf16")), tmp_path / "out")
    verify(source, tmp_path / "out")


def test_a_g_idx_that_names_no_group_is_an_error_naming_the_tensor(int4_copy: Path, tmp_path: Path, raw: Any) -> None:
    checkpoint = raw.load(int4_copy)
    cols = checkpoint[f"{EXPERT}.weight_packed"].shape[1] * 8
    index = torch.arange(cols, dtype=torch.int32) // 32
    index[9] = cols // 32
    checkpoint.put(f"{EXPERT}.weight_g_idx", raw.Tensor("I32", [cols], index.numpy().tobytes()))
    checkpoint.save()
    with pytest.raises(KconvertError, match=rf"{EXPERT}\.weight_g_idx' is 8 at \[9\], but there are groups 0 to 7"):
        convert(plan(int4_copy, Recipe("bf16")), tmp_path / "out")


@pytest.mark.parametrize(
    ("bits", "fault"), [(0x7F80, "is not finite"), (0x7FC0, "is not finite"), (0xFF80, "is not finite")]
)
def test_a_bad_scale_is_an_error_naming_the_tensor(
    int4_copy: Path, tmp_path: Path, raw: Any, bits: int, fault: str
) -> None:
    checkpoint = raw.load(int4_copy)
    tensor = checkpoint[f"{EXPERT}.weight_scale"]
    tensor.data = tensor.data[:8] + bits.to_bytes(2, "little") + tensor.data[10:]
    checkpoint.save()
    with pytest.raises(KconvertError, match=rf"{EXPERT}\.weight_scale' {fault} at \[0, 4\]"):
        convert(plan(int4_copy, Recipe("bf16")), tmp_path / "out")


def test_an_e8m0_scale_that_is_nan_is_an_error_naming_the_tensor(int4: Path, tmp_path: Path, raw: Any) -> None:
    convert(plan(int4, Recipe("mxfp4", "int4")), tmp_path / "mx")
    checkpoint = raw.load(tmp_path / "mx")
    tensor = checkpoint[f"{EXPERT}.weight_scale"]
    tensor.data = tensor.data[:-1] + b"\xff"
    checkpoint.save()
    with pytest.raises(KconvertError, match=rf"{EXPERT}\.weight_scale' is not finite"):
        convert(plan(tmp_path / "mx", Recipe("bf16")), tmp_path / "out")
