"""ModelOpt's, Quark's, MiniMax-M3's, DeepSeek-V4's and Ling-3's floats: names, shapes and configs as they write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spellings import BLOCKS, fp8_codes, spread

from kconvert import KconvertError, inspect

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([MAGNITUDES, -MAGNITUDES])
NVFP4 = {"quant_algo": "NVFP4", "group_size": 16}
MODELOPT = {"quant_method": "modelopt", **NVFP4, "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
EXPERT, DENSE = "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.q_proj"


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """The first column in the low nibble."""
    packed = packed.view(torch.uint8)
    return E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]


def nvfp4(name: str, rows: int = 48, cols: int = 80, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    """ModelOpt's tensors of a weight, and its values as `NVFP4QTensor.dequantize` has them: an odd number of groups a row."""
    noise = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=noise)
    scale = (torch.rand(rows, cols // 16, generator=noise) * 448).to(torch.float8_e4m3fn)
    scale[1, :2] = torch.tensor([0.0, 2.0**-9]).to(torch.float8_e4m3fn)
    factor = torch.tensor(0.000123)
    value = (e2m1(packed).view(rows, -1, 16) * (scale.float() * factor).unsqueeze(-1)).view(rows, cols).bfloat16()
    tensors = {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": factor,
        "input_scale": torch.tensor(torch.inf),
    }
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, value


def mx(name: str, suffixes: tuple[str, str], bits: int = 4, dtype: torch.dtype = torch.uint8) -> tuple[Tensors, Any]:
    """A weight [48, 96] in MXFP4 or MXFP8, its tensors called by the suffixes, and its values."""
    noise = torch.Generator().manual_seed(bits)
    scale = torch.randint(90, 140, (48, 3), dtype=torch.uint8, generator=noise)
    codes: torch.Tensor = torch.randint(0, 256, (48, 48), dtype=torch.uint8, generator=noise)
    codes = codes if bits == 4 else fp8_codes(48, 96)
    wide = e2m1(codes) if bits == 4 else codes.float()
    value = (wide.view(48, 3, 32) * torch.exp2(scale.float() - 127).unsqueeze(-1)).view(48, 96).bfloat16()
    codes = codes.view(torch.int8) if dtype == torch.float8_e8m0fnu and bits == 4 else codes
    return {f"{name}.{suffixes[0]}": codes, f"{name}.{suffixes[1]}": scale.view(dtype)}, value


def blocks(name: str, suffix: str, dtype: torch.dtype, block: int = 128) -> tuple[Tensors, torch.Tensor]:
    codes, grid = fp8_codes(130, 200), (-(-130 // block), -(-200 // block))
    scale = torch.exp2(torch.arange(grid[0] * grid[1]).float() % 7 - 9).view(grid).to(dtype)
    value = (codes.float() * spread(scale, 130, 200, block)).bfloat16()
    return {f"{name}.weight": codes, f"{name}.{suffix}": scale}, value


def configured(root: Path, **changes: Any) -> Path:
    """The checkpoint with these keys in its config.json; None takes one away."""
    path = root / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return root


def test_modelopts_nvfp4_has_the_values_of_its_own_dequantiser(write: Write, becomes: Any) -> None:
    tensors, value = nvfp4(DENSE)
    head = torch.randn(32, 80).bfloat16()
    becomes(write({**tensors, "lm_head.weight": head}, MODELOPT), {f"{DENSE}.weight": value, "lm_head.weight": head})


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt_fp4", **NVFP4},
        {"quant_method": "modelopt", "quantization": {**NVFP4, "exclude_modules": ["lm_head*"]}},
        {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16},
        {"quant_algo": "nvfp4_awq", "exclude_modules": []},
        {"quant_method": "modelopt_mixed", "quantized_layers": {"model.layers.0.self_attn": NVFP4}},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"layers.*.q_proj": NVFP4}},
    ],
    ids=lambda table: next(iter(table.values())) + str(len(table)),
)
@pytest.mark.parametrize("prefix", ["", "language_model.", "model.language_model."])
def test_nvfp4_is_declared_in_many_ways(write: Write, becomes: Any, quantization: Any, prefix: str) -> None:
    name = prefix + (DENSE.removeprefix("model.") if prefix.startswith("model.") else DENSE)
    tensors, value = nvfp4(name)
    becomes(write(tensors, quantization), {f"{name}.weight": value})


@pytest.mark.parametrize(
    ("algorithm", "shape"), [("FP8", ()), ("FP8_PER_CHANNEL_PER_TOKEN", (130,)), ("fp8_pc_pt", (130, 1))]
)
def test_modelopts_fp8_has_a_scale_for_the_weight_or_each_row(
    write: Write, becomes: Any, algorithm: str, shape: tuple[int, ...]
) -> None:
    codes, scale = fp8_codes(), torch.rand(shape) / 100
    value = (codes.float() * scale.view(-1, 1)).bfloat16()
    tensors = {f"{DENSE}.weight": codes, f"{DENSE}.weight_scale": scale, f"{DENSE}.input_scale": torch.tensor(1.0)}
    becomes(write(tensors, {"quant_method": "modelopt", "quant_algo": algorithm}), {f"{DENSE}.weight": value})


@pytest.mark.parametrize("four", [True, False], ids=["[n, 1, m, 1]", "[n, m]"])
@pytest.mark.parametrize("algorithm", ["FP8_PB_WO", "fp8_pb_real"])
def test_modelopts_fp8_in_blocks_has_scales_of_four_dimensions(
    write: Write, becomes: Any, algorithm: str, four: bool
) -> None:
    tensors, value = blocks(DENSE, "weight_scale", torch.float32)
    if four:
        tensors[f"{DENSE}.weight_scale"] = tensors[f"{DENSE}.weight_scale"][:, None, :, None]
    becomes(write(tensors, {"quant_method": "modelopt", "quant_algo": algorithm}), {f"{DENSE}.weight": value})


def test_a_scale_along_the_columns_is_not_taken_for_one_of_four_dimensions(write: Write) -> None:
    tensors = {f"{DENSE}.weight": fp8_codes(128, 128), f"{DENSE}.weight_scale": torch.ones(1, 1, 128, 1)}
    with pytest.raises(KconvertError, match="weight_scale"):
        inspect(write(tensors, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}))


@pytest.mark.parametrize(("algorithm", "bits"), [("MXFP4", 4), ("W4A8_MXFP4_FP8", 4), ("MXFP8", 8)])
def test_modelopts_mx(write: Write, becomes: Any, algorithm: str, bits: int) -> None:
    tensors, value = mx(DENSE, ("weight", "weight_scale"), bits)
    quantization = {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 32}
    becomes(write(tensors, quantization), {f"{DENSE}.weight": value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "int4_awq"])
def test_modelopts_int4_has_two_rows_in_a_byte(write: Write, becomes: Any, algorithm: str, dtype: torch.dtype) -> None:
    """Packed as its `pack_int4_in_uint8` packs."""
    codes, scale = torch.randint(-8, 8, (130, 256)).to(torch.int8), (torch.rand(130, 2) / 50).to(dtype)
    low, high = codes[::2] & 15, codes[1::2] & 15
    value = (codes.view(130, 2, 128).float() * scale.float().unsqueeze(-1)).view(130, 256).bfloat16()
    tensors = {f"{DENSE}.weight": (low | (high << 4)).view(torch.uint8), f"{DENSE}.weight_scale": scale}
    quantization = {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 128}
    becomes(write(tensors, quantization), {f"{DENSE}.weight": value})


@pytest.mark.parametrize("algorithm", ["W8A16", "W8A8_SQ_PER_CHANNEL"])
def test_modelopts_int8(write: Write, becomes: Any, algorithm: str) -> None:
    codes, scale = torch.randint(-128, 128, (130, 64)).to(torch.int8), torch.rand(130) / 50
    tensors = {f"{DENSE}.weight": codes, f"{DENSE}.weight_scale": scale}
    value = (codes.float() * scale.unsqueeze(1)).bfloat16()
    becomes(write(tensors, {"quant_method": "modelopt", "quant_algo": algorithm}), {f"{DENSE}.weight": value})


def test_a_mixed_model_is_read_by_names_of_parents_whatever_else_lies_below_them(write: Write, becomes: Any) -> None:
    """FP8 where NVFP4 is said, in an excluded module, and in one that nobody names; a router in BF16 inside a quantised one."""
    experts, expert = nvfp4(EXPERT)
    others = {name: blocks(name, "weight_scale", torch.float32) for name in (DENSE, f"{EXPERT}.x", "lm_head", "a.b")}
    router = torch.randn(8, 32).bfloat16()
    layers = {"model.layers.0.mlp": NVFP4, "model.layers.0.self_attn": {"quant_algo": "FP8_PB_WO"}}
    tensors = {**experts, "model.layers.0.mlp.gate.weight": router}
    values = {f"{EXPERT}.weight": expert, "model.layers.0.mlp.gate.weight": router}
    for name, (spelt, value) in others.items():
        tensors |= spelt
        values[f"{name}.weight"] = value
    quantization = {"quant_method": "modelopt_mixed", "quantized_layers": layers, "ignore": ["lm_head"]}
    becomes(write(tensors, quantization), values)


QUARK_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
QUARK_FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "symmetric": None}
QUARK = {"quant_method": "quark", "export": {"pack_method": "reorder"}, "exclude": ["lm_head", "re:.*gate$"]}


def test_quarks_mxfp4_beside_its_fp8(write: Write, becomes: Any) -> None:
    expert, value = mx(EXPERT, ("weight", "weight_scale"))
    attention, other = blocks(DENSE, "weight_scale", torch.float32)
    head, codes, rows = torch.randn(32, 80).bfloat16(), fp8_codes(), torch.rand(130) / 50
    tensors = {**expert, **attention, "lm_head.weight": head, "a.weight": codes, "a.weight_scale": rows}
    quantization = {
        **QUARK,
        "global_quant_config": {"weight": QUARK_FP4, "input_tensors": {**QUARK_FP4, "is_dynamic": True}},
        "layer_quant_config": {
            "*self_attn*": {"weight": {**QUARK_FP8, "qscheme": "per_block", "block_size": [128, 128]}},
            "a": {"weight": {**QUARK_FP8, "qscheme": "per_channel", "ch_axis": 0}},
        },
    }
    by_rows = (codes.float() * rows.unsqueeze(1)).bfloat16()
    values = {f"{EXPERT}.weight": value, f"{DENSE}.weight": other, "lm_head.weight": head, "a.weight": by_rows}
    becomes(write(tensors, quantization), values)


@pytest.mark.parametrize("shape", [(), (130,)], ids=str)
def test_quarks_int8_lies_in_its_own_order(write: Write, becomes: Any, shape: tuple[int, ...]) -> None:
    codes, scale = torch.randint(-128, 128, (130, 64)).to(torch.int8), (torch.rand(shape) / 50)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.weight_zero_point": torch.zeros(shape, dtype=torch.int32)}
    spec = {"dtype": "int8", "qscheme": "per_channel" if shape else "per_tensor", "symmetric": True}
    value = (codes.float() * scale.view(-1, 1)).bfloat16()
    becomes(write(tensors, {**QUARK, "global_quant_config": {"weight": spec}}), {"a.weight": value})


@pytest.mark.parametrize(
    "spec",
    [
        {"dtype": "int4", "qscheme": "per_group", "group_size": 128},
        {"dtype": "mx", "qscheme": "per_group", "mx_element_dtype": "fp4"},
        {"dtype": "fp8_e5m2", "qscheme": "per_tensor"},
        {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "scale_format": "float32"},
    ],
    ids=lambda spec: spec["dtype"],
)
def test_quarks_other_encodings_are_named(write: Write, spec: dict[str, Any]) -> None:
    table = {**QUARK, "global_quant_config": {"weight": spec}}
    said = (
        f"global_quant_config.weight is '{spec['dtype']}' '{spec['qscheme']}', which of Quark's encodings is not read"
    )
    with pytest.raises(KconvertError, match=said):
        inspect(write({"a.weight": torch.zeros(2, 2)}, table))


def test_minimax_m3s_mxfp8(write: Write, becomes: Any) -> None:
    tensors, value = mx(EXPERT, ("weight", "weight_scale_inv"), 8)
    quantization = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]}
    becomes(write(tensors, quantization), {f"{EXPERT}.weight": value})


V4 = {**BLOCKS, "scale_fmt": "ue8m0"}
V4_EXPERT, V4_MTP, V4_DENSE = "layers.0.ffn.experts.1.w2", "mtp.0.ffn.experts.1.w2", "layers.0.attn.wq_a"


@pytest.mark.parametrize(
    ("quantization", "around"),
    [
        (V4, {"expert_dtype": "fp4"}),
        (V4, {}),
        (V4, {"expert_dtype": "fp8"}),
        ({**V4, "expert_dtype": "fp4"}, {"model_type": "deepseek_v41_like", "text_config": {}}),
        (V4, {"text_config": {"expert_dtype": "fp4"}}),
        ({**V4, "modules_to_not_convert": [V4_DENSE, V4_EXPERT]}, {}),
    ],
    ids=["fp4", "nothing", "fp8", "inside", "nested", "excluded"],
)
def test_deepseek_v4s_experts_are_what_their_tensors_are(
    write: Write, becomes: Any, quantization: Any, around: Any
) -> None:
    """Whether expert_dtype says so or nothing does; one more expert in FP8, as in Flash-Base."""
    expert, fp4 = mx(V4_EXPERT, ("weight", "scale"), 4, torch.float8_e8m0fnu)
    dense, value = blocks(V4_DENSE, "scale", torch.float8_e8m0fnu)
    base, other = blocks("layers.1.ffn.experts.1.w2", "scale", torch.float32)
    root = configured(write({**expert, **dense, **base}, quantization), **{"model_type": "deepseek_v4_like", **around})
    becomes(root, {f"{V4_EXPERT}.weight": fp4, f"{V4_DENSE}.weight": value, "layers.1.ffn.experts.1.w2.weight": other})


def test_deepseek_v41s_blocks_of_32_beside_tables_of_1x32(write: Write, becomes: Any) -> None:
    dense, value = blocks(V4_DENSE, "scale", torch.float8_e8m0fnu, 32)
    table, embedded = mx("layers.1.engram.embed", ("weight", "scale"), 8, torch.float8_e8m0fnu)
    quantization = {**V4, "weight_block_size": [32, 32], "expert_dtype": "fp4"}
    root = configured(write({**dense, **table}, quantization), model_type="deepseek_v41_like")
    becomes(root, {f"{V4_DENSE}.weight": value, "layers.1.engram.embed.weight": embedded})


def test_nvidias_deepseek_v4_has_nvfp4_experts_and_keeps_mxfp4_in_mtp(write: Write, becomes: Any) -> None:
    expert, value = nvfp4(V4_EXPERT)
    mtp, fp4 = mx(V4_MTP, ("weight", "scale"), 4, torch.float8_e8m0fnu)
    dense, other = blocks(V4_DENSE, "scale", torch.float8_e8m0fnu)
    quantization = {**V4, "moe_quant_algo": "NVFP4", "ignore": ["mtp.*"]}
    root = configured(
        write({**expert, **mtp, **dense}, quantization), model_type="deepseek_v4_like", expert_dtype="fp4"
    )
    becomes(root, {f"{V4_EXPERT}.weight": value, f"{V4_MTP}.weight": fp4, f"{V4_DENSE}.weight": other})


@pytest.mark.parametrize("key", ["routed_experts_quant_method", "store_dtype"])
def test_ling_3s_experts_call_an_mxfp4_scale_weight_scale_inv(write: Write, becomes: Any, key: str) -> None:
    expert, value = mx(EXPERT, ("weight", "weight_scale_inv"))
    dense, other = blocks(DENSE, "weight_scale_inv", torch.float32)
    becomes(write({**expert, **dense}, {**V4, key: "mxfp4"}), {f"{EXPERT}.weight": value, f"{DENSE}.weight": other})


def test_a_file_beside_config_json_alone_may_declare_it(write: Write, becomes: Any) -> None:
    tensors, value = nvfp4(EXPERT)
    root = configured(write(tensors, {}), quantization_config=None)
    content = {"producer": {"name": "modelopt"}, "quantization": {**NVFP4, "exclude_modules": ["lm_head"]}}
    (root / "hf_quant_config.json").write_text(json.dumps(content))
    becomes(root, {f"{EXPERT}.weight": value})


def test_what_a_file_beside_config_json_says_of_plain_weights_is_not_asked(write: Write) -> None:
    root = configured(write({f"{EXPERT}.weight": torch.randn(8, 32)}, {}), quantization_config=None)
    (root / "quantize_config.json").write_text("{")
    assert [weight.format.label for weight in inspect(root).weights] == ["f32"]


def test_config_json_comes_before_a_file_beside_it(write: Write, becomes: Any) -> None:
    tensors, value = nvfp4(EXPERT)
    root = write(tensors, MODELOPT)
    (root / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    becomes(root, {f"{EXPERT}.weight": value})
