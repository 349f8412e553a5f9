"""Encodings as people's files have them: read with the values that they mean, or refused in a sentence that is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from spellings import BLOCKS, FP8, NAMES, declared, fp8_codes, spread

from kconvert import CheckFailed, KconvertError, Recipe, convert, inspect, plan, verify

Write = Callable[..., Path]
ONES = pytest.mark.parametrize("ones", [(), (1,), (1, 1)], ids=str)


@ONES
def test_one_number_is_one_number_in_every_shape(write: Write, becomes: Any, ones: tuple[int, ...]) -> None:
    """NVFP4's global scale above all: torch divides a scale by a tensor [] in another dtype than by one [1]."""
    packed = torch.randint(0, 256, (64, 64), dtype=torch.uint8)
    scale = (torch.rand(64, 8) * 100 + 1).to(torch.float8_e4m3fn)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    codes = table[torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()]
    value = (codes.view(64, 8, 16) * (scale.float() / 1234.5).unsqueeze(-1)).view(64, 128).bfloat16()
    beside = {"a.input_global_scale": torch.full(ones, torch.inf)}
    tensors = {"a.weight_packed": packed, "a.weight_scale": scale, "a.weight_global_scale": torch.full(ones, 1234.5)}
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    becomes(write({**tensors, **beside}, declared("nvfp4-pack-quantized", **scheme)), {"a.weight": value})


@ONES
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_fp8_with_one_scale_is_read_under_either_name(
    write: Write, becomes: Any, name: str, dtype: torch.dtype, ones: tuple[int, ...]
) -> None:
    codes, scale = fp8_codes(), torch.full(ones, 2.0**-7).to(dtype)
    tensors = {"a.weight": codes, f"a.{name}": scale, "a.activation_scale": torch.full(ones, torch.nan)}
    becomes(write(tensors, FP8), {"a.weight": (codes.float() * scale.float()).bfloat16()})


@ONES
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_int8_with_one_scale(write: Write, becomes: Any, symmetric: bool, ones: tuple[int, ...]) -> None:
    codes, scale = torch.randint(-128, 128, (32, 64)).to(torch.int8), torch.full(ones, 0.013).bfloat16()
    tensors = {"a.weight": codes, "a.weight_scale": scale}
    if not symmetric:
        tensors["a.weight_zero_point"] = torch.full((1,), 5, dtype=torch.int8)
    value = ((codes.float() - (0 if symmetric else 5)) * scale.float()).bfloat16()
    becomes(write(tensors, declared("int-quantized", strategy="tensor", symmetric=symmetric)), {"a.weight": value})


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(130, 1), (130,)], ids=str)
@pytest.mark.parametrize("quantization", [FP8, BLOCKS], ids=["fp8", "fp8 in blocks"])
def test_fp8_scales_of_rows_are_known_by_their_shape(
    write: Write, becomes: Any, quantization: dict[str, Any], name: str, shape: tuple[int, ...]
) -> None:
    codes, scale = fp8_codes(), torch.rand(shape) / 100
    value = (codes.float() * scale.view(130, 1)).bfloat16()
    becomes(write({"a.weight": codes, f"a.{name}": scale}, quantization), {"a.weight": value})


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_fp8_blocks_with_powers_of_two_as_scales(write: Write, becomes: Any, name: str, stored: torch.dtype) -> None:
    codes, scale = fp8_codes(), torch.tensor([[127, 3], [0, 120]], dtype=torch.uint8)
    value = (codes.float() * spread(scale.view(torch.float8_e8m0fnu), 130, 200)).bfloat16()
    becomes(write({"a.weight": codes, f"a.{name}": scale.view(stored)}, BLOCKS), {"a.weight": value})


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_an_exponent_that_is_nan_is_refused_by_name(write: Write, tmp_path: Path, stored: torch.dtype) -> None:
    scale = torch.tensor([[127, 3], [0, 255]], dtype=torch.uint8).view(stored)
    source = write({"a.weight": fp8_codes(), "a.weight_scale_inv": scale}, BLOCKS)
    with pytest.raises(KconvertError, match=r"a\.weight_scale_inv' is not finite at \[1, 1\]"):
        convert(plan(source, Recipe("bf16")), tmp_path / "out")


def test_a_head_and_an_embedding_in_fp8_are_what_they_are(write: Write, becomes: Any) -> None:
    """The dialect never means lm_head, and lists may name what is quantised all the same."""
    names = ("lm_head", "model.embed_tokens", "model.layers.0.q_proj")
    codes, scale = fp8_codes(), torch.rand(2, 2) / 100
    tensors = {
        f"{name}.{suffix}": t for name in names for suffix, t in (("weight", codes), ("weight_scale_inv", scale))
    }
    value = (codes.float() * spread(scale, 130, 200)).bfloat16()
    becomes(
        write(tensors, {**BLOCKS, "modules_to_not_convert": names[1:]}), {f"{name}.weight": value for name in names}
    )


@pytest.mark.parametrize("format", ["dense", "int-quantized", "float-quantized", "pack-quantized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_weight_in_floats_is_its_own_value_whatever_scale_lies_beside_it(
    write: Write, raw: Any, tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    """Fake-quantised for training, or left in BF16 with a scale that was never written."""
    plain, codes = torch.randn(32, 64).to(dtype), torch.randint(-128, 128, (32, 64)).to(torch.int8)
    beside = {
        "a.weight_scale": torch.full((32, 2), torch.nan).bfloat16(),
        "a.weight_zero_point": torch.ones(32, 2, dtype=torch.int8),
        "a.input_scale": torch.zeros(()),
    }
    others = {"b.weight": codes, "b.weight_scale": torch.rand(32, 1).bfloat16()}
    quantization = declared(format, strategy="channel")
    other = declared("int-quantized", strategy="channel")["config_groups"]["group_0"]
    quantization["config_groups"]["group_0"]["targets"] = ["a"]
    quantization["config_groups"]["b"] = {**other, "targets": ["b"], "format": "int-quantized"}
    source = write({"a.weight": plain, **beside, **others}, quantization)
    (a, _) = inspect(source).weights
    assert a.format.label == NAMES[dtype].lower()
    assert {tensor.name for tensor in a.companions} == beside.keys()
    convert(plan(source, Recipe("bf16")), tmp_path / "out")
    verify(source, tmp_path / "out")
    written = raw.load(tmp_path / "out")
    assert sorted(written) == ["a.weight", "b.weight"]
    assert written["a.weight"].data == plain.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_may_be_negative_where_the_largest_value_is_to_have_the_lowest_code(
    write: Write, becomes: Any, bits: int, packed: bool, dtype: torch.dtype
) -> None:
    """auto-round's symmetric integers: half of the scales. A zero under such a scale is -0."""
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (32, 64)).to(torch.int8)
    codes[:, :5] = 0
    scale = (torch.randn(32, 2) / 100).to(dtype)
    value = (codes.view(32, 2, 32).to(dtype) * scale.unsqueeze(-1)).view(32, 64)
    assert bool((value.view(torch.uint8).view(32, 64, -1)[:, :5] != 0).any())
    tensors = {"a.weight_scale": scale}
    tensors |= {"a.weight_packed": pack_to_int32(codes, bits)} if packed else {"a.weight": codes}
    scheme = declared("pack-quantized" if packed else "int-quantized", num_bits=bits, strategy="group", group_size=32)
    becomes(write(tensors, scheme), {"a.weight": value.bfloat16()})


ZEROS = {
    "packed": pack_to_int32(torch.zeros(44, 2, dtype=torch.int8), 4, packed_dim=0),
    "packed, filled up": torch.full((6, 2), 0x88888888 - (1 << 32), dtype=torch.int32),
    "I8": torch.zeros(44, 2, dtype=torch.int8),
    "I32": torch.zeros(44, 2, dtype=torch.int32),
    "BF16, one of them -0": torch.tensor([0.0, -0.0] * 44).view(44, 2).bfloat16(),
    "I64": torch.zeros(44, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("zeros", ZEROS)
def test_zero_points_that_are_zero_mean_nothing_beside_symmetric_codes(
    write: Write, becomes: Any, tmp_path: Path, zeros: str
) -> None:
    codes, scale = torch.randint(-8, 8, (44, 64)).to(torch.int8), (torch.rand(44, 2) / 100).bfloat16()
    value = (codes.view(44, 2, 32).bfloat16() * scale.unsqueeze(-1)).view(44, 64)
    scheme = declared("pack-quantized", num_bits=4, strategy="group", group_size=32)
    tensors = {"a.weight_packed": pack_to_int32(codes, 4), "a.weight_scale": scale}
    becomes(write({**tensors, "a.weight_zero_point": ZEROS[zeros]}, scheme), {"a.weight": value})
    meant = ZEROS[zeros].clone()
    meant[5, 1] += 1 if zeros != "packed" else 1 << 8
    source = write({**tensors, "a.weight_zero_point": meant}, scheme, "meant")
    with pytest.raises(KconvertError, match=r"a\.weight_zero_point' has zero points other than zero, but config\.json"):
        convert(plan(source, Recipe("bf16")), tmp_path / "refused")
    assert not list((tmp_path / "refused").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["fp8", "int8", "mxfp4", "nvfp4"])
def test_zero_points_that_are_zero_mean_nothing_in_any_encoding(
    write: Write, raw: Any, tmp_path: Path, name: str
) -> None:
    group = {"strategy": "group", "type": "float"}
    tensors, scheme = {
        "fp8": ({"weight": fp8_codes(32, 64), "weight_scale": torch.ones(1)}, FP8),
        "int8": (
            {"weight": torch.ones(32, 64, dtype=torch.int8), "weight_scale": torch.ones(32, 1)},
            declared("int-quantized", strategy="channel"),
        ),
        "mxfp4": (
            {
                "weight_packed": torch.ones(32, 32, dtype=torch.uint8),
                "weight_scale": torch.ones(32, 2, dtype=torch.uint8),
            },
            declared("mxfp4-pack-quantized", **group, num_bits=4, group_size=32),
        ),
        "nvfp4": (
            {
                "weight_packed": torch.ones(32, 32, dtype=torch.uint8),
                "weight_scale": torch.ones(32, 4).to(torch.float8_e4m3fn),
                "weight_global_scale": torch.ones(()),
            },
            declared("nvfp4-pack-quantized", **{**group, "strategy": "tensor_group"}, num_bits=4, group_size=16),
        ),
    }[name]
    without = write({f"a.{suffix}": tensor for suffix, tensor in tensors.items()}, scheme, "without")
    tensors["weight_zero_point"] = torch.zeros(32, 1).to(torch.float8_e4m3fn)
    source = write({f"a.{suffix}": tensor for suffix, tensor in tensors.items()}, scheme)
    for root, output in ((without, "one"), (source, "two")):
        convert(plan(root, Recipe("bf16")), tmp_path / output)
        verify(root, tmp_path / output)
    assert raw.load(tmp_path / "one")["a.weight"].data == raw.load(tmp_path / "two")["a.weight"].data


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 0.0, -1.0])
def test_no_scale_of_activations_stops_a_run(write: Write, becomes: Any, value: float) -> None:
    """Experts that no token reached have Inf there."""
    codes = fp8_codes()
    tensors = {"a.weight": codes, "a.weight_scale": torch.ones(1), "a.input_scale": torch.tensor(value)}
    beside = {"a.output_zero_point": torch.ones(3, dtype=torch.int8), "a.input_amax": torch.full((2, 2), value)}
    becomes(write({**tensors, **beside}, FP8), {"a.weight": codes.bfloat16()})


def test_what_describes_activations_stays_beside_codes_that_are_copied(raw: Any, int4: Path, tmp_path: Path) -> None:
    convert(plan(int4, Recipe("fp8", layout="all")), tmp_path / "fp8")
    name = "model.layers.1.mlp.experts.0.up_proj.input_scale"
    source = raw.load(tmp_path / "fp8")
    source.put(name, raw.Tensor("F32", [], b"\0\0\x80\x7f"))
    source.save()
    convert(plan(tmp_path / "fp8", Recipe("fp8", layout="experts")), tmp_path / "out")
    verify(tmp_path / "fp8", tmp_path / "out")
    output = raw.load(tmp_path / "out")
    output[name].data = bytes(4)
    output.save()
    with pytest.raises(CheckFailed, match=f"{name}' differs"):
        verify(tmp_path / "fp8", tmp_path / "out")
    output.pop(name)
    output.save()
    with pytest.raises(CheckFailed, match=f"{name}' is missing"):
        verify(tmp_path / "fp8", tmp_path / "out")


@pytest.mark.parametrize("lies", ["int4", "fp8"])
def test_no_sentence_speaks_of_an_encoding_that_was_not_meant(write: Write, lies: str) -> None:
    int4 = declared("pack-quantized", num_bits=4, strategy="group", group_size=32)
    if lies == "int4":
        packed, scale = torch.zeros(128, 32, dtype=torch.int32), torch.ones(128, 8)
        source = write({"a.weight_packed": packed, "a.weight_scale": scale}, BLOCKS)
    else:
        source = write({"a.weight": fp8_codes(128, 256), "a.weight_scale_inv": torch.ones(1, 2)}, int4)
    with pytest.raises(KconvertError) as caught:
        inspect(source)
    assert "while config.json says it is " in str(caught.value)
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "bits", "kind", "told"),
    [
        ("pack-quantized", 3, "int", "integers of four and eight bits by group and channel"),
        ("int-quantized", 2, "int", "integers of four to eight bits by channel, tensor and group"),
        ("float-quantized", 4, "float", "FP8 by block, channel and tensor, symmetric"),
    ],
)
def test_a_scheme_that_is_not_read_is_told_what_is_of_its_own_kind(
    write: Write, format: str, bits: int, kind: str, told: str
) -> None:
    tensors = {"a.weight": torch.zeros(4, 32, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
    source = write(tensors, declared(format, num_bits=bits, type=kind, strategy="channel"))
    with pytest.raises(KconvertError, match=f"is not supported; supported: {told}$"):
        inspect(source)


INT4 = torch.full((32, 8), -1, dtype=torch.int32)  # codes of 15, which less 8 are 7
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
GROUPS = {"strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
E4M3 = torch.full((32, 64), 0x7E, dtype=torch.uint8)  # 448
# A weight's tensors by its largest scale, how config.json declares them, and the largest code under that scale.
HUGE: dict[str, tuple[Callable[[float], dict[str, torch.Tensor]], dict[str, Any], float]] = {
    "int4": (
        lambda x: {"weight_packed": INT4, "weight_scale": scales(x, torch.bfloat16)},
        declared("pack-quantized", **GROUPS, num_bits=4),
        7,
    ),
    "int4, act order": (
        lambda x: {
            "weight_packed": INT4,
            "weight_scale": scales(x, torch.bfloat16),
            "weight_g_idx": torch.arange(64).flip(0).int() // 32,
        },
        declared("pack-quantized", **GROUPS, num_bits=4, actorder="group"),
        7,
    ),
    "gptq": (
        lambda x: {
            "qweight": torch.full((8, 32), -1, dtype=torch.int32),
            "qzeros": torch.full((2, 4), 0x77777777, dtype=torch.int32),
            "scales": scales(-x, torch.bfloat16).T,
        },
        GPTQ,
        7,
    ),
    "awq": (
        lambda x: {
            "qweight": torch.zeros((64, 4), dtype=torch.int32),
            "qzeros": torch.full((2, 4), 0x88888888 - (1 << 32), dtype=torch.int32),
            "scales": scales(x, torch.bfloat16).T,
        },
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        8,
    ),
    "int8": (
        lambda x: {
            "weight": torch.full((32, 64), 127, dtype=torch.int8),
            "weight_scale": torch.full((32, 1), x).bfloat16(),
        },
        declared("int-quantized", num_bits=8, strategy="channel"),
        127,
    ),
    "fp8": (lambda x: {"weight": E4M3.view(torch.float8_e4m3fn), "weight_scale": torch.full((1,), x)}, FP8, 448),
    "mxfp4": (
        lambda x: {"weight_packed": torch.full((32, 32), 0x77, dtype=torch.uint8), "weight_scale": exponents(x)},
        declared("mxfp4-pack-quantized", **GROUPS, num_bits=4, type="float"),
        6,
    ),
    "mxfp8": (
        lambda x: {"weight": E4M3.view(torch.float8_e4m3fn), "weight_scale": exponents(x)},
        declared("mxfp8-quantized", **GROUPS, num_bits=8, type="float"),
        448,
    ),
    "nvfp4": (
        lambda x: {
            "weight_packed": torch.full((32, 32), 0x77, dtype=torch.uint8),
            "weight_scale": E4M3[:, :4].view(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([1 / x]),
        },
        declared("nvfp4-pack-quantized", **NVFP4),
        2688,
    ),
}


def scales(largest: float, dtype: torch.dtype) -> torch.Tensor:
    """[32, 2], the last of them this one."""
    values = torch.full((32, 2), 0.01)
    values[31, 1] = largest
    return values.to(dtype)


def exponents(largest: float) -> torch.Tensor:
    values = torch.full((32, 2), 120, dtype=torch.uint8)
    values[31, 1] = 127 + int(torch.tensor(largest).log2().floor())
    return values


@pytest.mark.parametrize("encoding", HUGE)
def test_values_that_are_infinite_in_bf16_are_refused_and_the_largest_are_not(
    write: Write, tmp_path: Path, encoding: str
) -> None:
    make, quantization, largest = HUGE[encoding]
    fits, too_large = (
        write({f"a.{suffix}": tensor for suffix, tensor in make(x / largest).items()}, quantization, name)
        for name, x in (("fits", 3.2e38), ("too large", 3.4e38 * 1.9))
    )
    convert(plan(fits, Recipe("bf16")), tmp_path / "out")
    verify(fits, tmp_path / "out")
    with pytest.raises(
        KconvertError, match=r"'a' cannot be read as .*: it has a scale so large that a value is infinite"
    ):
        convert(plan(too_large, Recipe("bf16")), tmp_path / "out2")


@pytest.mark.parametrize(("largest", "dtype"), [(30000, torch.float16), (3.399e38 / 7, torch.float32)], ids=str)
def test_values_that_are_infinite_in_the_dtype_of_their_scale_or_once_rounded_are_refused(
    write: Write, tmp_path: Path, largest: float, dtype: torch.dtype
) -> None:
    """compressed-tensors multiplies in the scale's dtype, and so does what reads its codes here."""
    tensors = {"a.weight_packed": INT4, "a.weight_scale": scales(largest, dtype)}
    source = write(tensors, declared("pack-quantized", **GROUPS, num_bits=4))
    with pytest.raises(KconvertError, match="so large that a value is infinite in rows 0 to 31"):
        convert(plan(source, Recipe("bf16")), tmp_path / "out")
