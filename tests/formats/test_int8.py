"""Unpacked INT8 in compressed-tensors' layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from kconvert.formats import recognise
from kconvert.formats.base import Scheme
from kconvert.formats.int8 import Int8
from kconvert.formats.reference import int8 as reference

NAMES = {torch.bfloat16: "BF16", torch.int8: "I8"}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def scheme(strategy: str, group_size: int | None, symmetric: bool) -> QuantizationScheme:
    args = QuantizationArgs(num_bits=8, symmetric=symmetric, strategy=strategy, group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=args)


def compress(weight: torch.Tensor, strategy: str, group_size: int | None, symmetric: bool) -> dict[str, torch.Tensor]:
    plan = scheme(strategy, group_size, symmetric)
    groups = (
        weight.reshape(1, -1) if strategy == "tensor" else weight.view(len(weight), -1, group_size or weight.shape[1])
    )
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), plan.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return dict(IntQuantizationCompressor.compress(state, plan))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("strategy", "group_size"), [("channel", None), ("tensor", None), ("group", 32), ("group", 5)])
def test_values_equal_compressed_tensors(
    codec: Any, strategy: str, group_size: int | None, symmetric: bool, dtype: str
) -> None:
    weight = (0.02 * torch.randn(21, 160) ** 3 + 0.01).to(DTYPES[dtype])
    state = compress(weight, strategy, group_size, symmetric)
    expected = IntQuantizationCompressor.decompress(state, scheme(strategy, group_size, symmetric))["weight"]
    format = Int8(strategy, group_size, symmetric, dtype)
    assert torch.equal(codec.decode(format, state, 21, 160), expected.float())
    scale, zero = (
        state["weight_scale"].view(-1, expected.shape[1] // (group_size or 160)),
        state.get("weight_zero_point"),
    )
    zero = None if zero is None else zero.view(scale.shape)
    assert torch.equal(reference.decode(state["weight"], scale, zero), expected)


@given(seed=st.integers(0, 2**32), power=st.integers(-133, 120), cubed=st.booleans())
@settings(max_examples=60)
def test_kernels_reference_and_compressed_tensors_quantise_alike(
    codec: Any, seed: int, power: int, cubed: bool
) -> None:
    noise = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 128, generator=noise) ** (3 if cubed else 1)
    weight[3] = 0
    weight[4] = (weight[4] * 4).round() / 2 + 0.25
    weight = (weight * 2.0**power).clamp(-3e38, 3e38).bfloat16()
    tensors, lost = codec.encode(Int8(), weight)
    codes, scale = reference.encode(weight)
    assert lost == 0
    assert torch.equal(tensors["weight"], codes)
    assert torch.equal(tensors["weight_scale"], scale)
    theirs = compress(weight, "channel", None, True)
    assert torch.equal(scale, theirs["weight_scale"])
    assert torch.equal(codes, theirs["weight"])


def test_a_value_that_is_not_finite_is_refused(codec: Any) -> None:
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(Int8(), torch.full((8, 64), float("nan")))


SCHEME = Scheme("int-quantized", strategy="channel")
FOUND = {"weight": ("I8", (8, 64)), "weight_scale": ("BF16", (8, 1))}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("strategy", "group_size"), [("channel", None), ("tensor", None), ("group", 32)])
def test_a_scale_of_zero_is_sound_over_zeros_and_over_nothing_else(
    codec: Any, strategy: str, group_size: int | None, symmetric: bool
) -> None:
    format = Int8(strategy, group_size, symmetric)
    shape = format.parts(8, 64)[1].shape
    zero = torch.full(shape, 3, dtype=torch.int8)
    codes = torch.full((8, 64), 0 if symmetric else 3, dtype=torch.int8)
    state = {"weight": codes, "weight_scale": torch.zeros(shape, dtype=torch.bfloat16), "weight_zero_point": zero}
    assert not codec.decode(format, state, 8, 64).any()
    codes[7, 63] += 1
    with pytest.raises(ValueError, match="scale of zero over codes that are not"):
        codec.decode(format, state, 8, 64)


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_fewer_bits_one_to_a_byte_have_the_values_of_compressed_tensors(codec: Any, bits: int, symmetric: bool) -> None:
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    plan = QuantizationScheme(targets=["Linear"], weights=args)
    weight = (0.02 * torch.randn(24, 64) + 0.01).bfloat16()
    groups = weight.view(24, 2, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = IntQuantizationCompressor.compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, plan
    )
    declared = Scheme("int-quantized", bits, symmetric=symmetric, strategy="group", group_size=32)
    found = {suffix: (NAMES[tensor.dtype], tuple(tensor.shape)) for suffix, tensor in state.items()}
    format, shape = recognise(declared, found, None)
    assert format.label == f"int{bits} unpacked group 32" + ("" if symmetric else " asymmetric")
    expected = IntQuantizationCompressor.decompress(dict(state), plan)["weight"]
    assert torch.equal(codec.decode(format, state, *shape), expected.float())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"weight_scale": None}, "its weight is I8 and nothing beside it is read as its scale"),
        ({"weight": ("U8", (8, 64))}, r"its weight is U8 \[8, 64\], not an I8 matrix"),
        ({"weight_scale": ("I32", (8, 1))}, "its weight_scale is I32"),
        ({"weight_zero_point": ("BOOL", (8, 1))}, "its weight_zero_point is BOOL"),
        (
            {"weight_shape": ("I64", (2,))},
            "weight_shape does not belong to it, while config.json says it is int-quantized",
        ),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], fault: str) -> None:
    found = {suffix: facts for suffix, facts in {**FOUND, **change}.items() if facts}
    with pytest.raises(ValueError, match=fault):
        recognise(SCHEME, found, None)
