"""Microscaling floats and NVFP4: e2m1 over every code and every bf16, whole weights against compressed-tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from kconvert.formats import recognise
from kconvert.formats.base import Scheme
from kconvert.formats.kernels import mx as kernels
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.reference import mx as reference
from kconvert.formats.reference import nvfp4 as nvfp4_reference

BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
COMPRESSORS = {4: MXFP4PackedCompressor, 8: MXFP8QuantizationCompressor}
BITS = pytest.mark.parametrize("bits", [4, 8], ids=["mxfp4", "mxfp8"])


@njit
def round_all(values: Any, codes: Any) -> None:
    for i in range(len(values)):
        codes[i] = kernels.round_e2m1(values[i])


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def mx_scheme(bits: int) -> QuantizationScheme:
    args = QuantizationArgs(num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    return QuantizationScheme(targets=["Linear"], weights=args)


def compress(weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    groups = weight.view(len(weight), -1, 32)
    plan = mx_scheme(bits)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), plan.weights)
    return dict(COMPRESSORS[bits].compress({"weight": weight, "weight_scale": scale}, plan))


def test_every_finite_bf16_rounds_to_the_e2m1_of_compressed_tensors() -> None:
    finite = BF16[BF16.isfinite()]
    theirs = pack_fp4_to_uint8(cast_to_fp4(finite.clamp(-6, 6).clone()).view(1, -1)).view(-1)
    codes = reference.round_e2m1(finite)
    assert torch.equal(codes[::2] | (codes[1::2] << 4), theirs)
    ours = np.zeros(len(finite), np.uint8)
    round_all(finite.float().numpy(), ours)
    assert torch.equal(torch.from_numpy(ours), codes)


@BITS
@pytest.mark.parametrize("scale_dtype", ["U8", "F8_E8M0"])
def test_every_code_with_every_scale_has_the_value_of_compressed_tensors(
    codec: Any, bits: int, scale_dtype: str
) -> None:
    scale = torch.arange(255, dtype=torch.uint8).repeat_interleave(8).view(255, 8)
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    codes[:, 127] = codes[:, 255] = 0  # NaN in e4m3
    codes = codes[:, :128] if bits == 4 else codes.view(torch.float8_e4m3fn)
    state = {"weight_packed" if bits == 4 else "weight": codes, "weight_scale": scale}
    expected = COMPRESSORS[bits].decompress(state, mx_scheme(bits))["weight"]
    assert torch.equal(bits_of(reference.decode(codes, scale)), bits_of(expected))
    values = codec.decode(Mx(bits, scale_dtype), state, *expected.shape)
    assert torch.equal(bits_of(values), bits_of(expected.float()))


@BITS
@given(seed=st.integers(0, 2**32), power=st.integers(-133, 125), cubed=st.booleans())
@settings(max_examples=60)
def test_kernels_reference_and_compressed_tensors_quantise_alike(
    codec: Any, bits: int, seed: int, power: int, cubed: bool
) -> None:
    noise = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 128, generator=noise) ** (3 if cubed else 1)
    weight[3] = 0
    weight[4, ::3] = -0.0
    weight[5] = (weight[5] * 8).round() / 4 + 0.125
    weight = (weight * 2.0**power).clamp(-2.9e38, 2.9e38).bfloat16()  # they take more for infinite
    tensors, lost = codec.encode(Mx(bits), weight)
    codes, scale = reference.encode(weight, bits)
    name = "weight_packed" if bits == 4 else "weight"
    assert lost == 0
    assert torch.equal(tensors["weight_scale"], scale)
    assert torch.equal(bits_of(tensors[name]), bits_of(codes))
    searched, _ = codec.encode(Mx(bits, mse=True), weight)
    best, best_scale = reference.encode(weight, bits, mse=True)
    assert torch.equal(searched["weight_scale"], best_scale)
    assert torch.equal(bits_of(searched[name]), bits_of(best))
    theirs = compress(weight, bits)
    assert torch.equal(scale, theirs["weight_scale"])
    assert torch.equal(bits_of(codes), bits_of(theirs[name]))


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", [{}, {"mse": True}, {"exact": True}], ids=str)
def test_values_finer_than_bf16_are_rounded_once(
    codec: Any, bits: int, dtype: torch.dtype, rule: dict[str, bool]
) -> None:
    weight = (torch.randn(64, 256, generator=torch.Generator().manual_seed(bits)) * 0.02).to(dtype)
    tensors, _ = codec.encode(Mx(bits, **rule), weight)
    codes, scale = reference.encode(weight, bits, **rule)
    name = "weight_packed" if bits == 4 else "weight"
    assert torch.equal(tensors["weight_scale"], scale)
    assert torch.equal(bits_of(tensors[name]), bits_of(codes))
    if bits == 8:
        step = torch.pow(2.0, scale.float() - 127).repeat_interleave(32, 1)
        assert torch.equal(bits_of(codes), bits_of((weight.float() / step).clamp(-448, 448).to(torch.float8_e4m3fn)))


@BITS
def test_the_largest_values_saturate_and_stay_finite(codec: Any, bits: int) -> None:
    largest = torch.full((8, 32), 3.3895314e38).bfloat16()
    tensors, _ = codec.encode(Mx(bits), largest)
    assert codec.decode(Mx(bits), tensors, 8, 32).isfinite().all()


def test_nvfp4_has_the_values_of_compressed_tensors(codec: Any) -> None:
    weight = (0.02 * torch.randn(64, 128) ** 3).bfloat16()
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    plan = QuantizationScheme(targets=["Linear"], weights=args)
    groups = weight.view(64, -1, 16)
    global_scale = generate_gparam(weight.amin(), weight.amax())
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    state = dict(NVFP4PackedCompressor.compress(state, plan))
    state["weight_packed"] = torch.randint(0, 256, (64, 64), dtype=torch.uint8)
    state["weight_scale"] = torch.arange(512).remainder(127).to(torch.uint8).view(torch.float8_e4m3fn).view(64, 8)
    expected = NVFP4PackedCompressor.decompress(state, plan)["weight"]
    values = codec.decode(Nvfp4(), state, 64, 128)
    assert torch.equal(bits_of(values), bits_of(expected.float()))
    ours = nvfp4_reference.decode(state["weight_packed"], state["weight_scale"], global_scale)
    assert torch.equal(bits_of(ours), bits_of(expected))


@BITS
def test_a_value_that_is_not_finite_is_refused(codec: Any, bits: int) -> None:
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(Mx(bits), torch.full((8, 64), float("-inf")))


MXFP4 = Scheme("mxfp4-pack-quantized", 4, "float", strategy="group", group_size=32)
MXFP8 = Scheme("mxfp8-quantized", 8, "float", strategy="group", group_size=32)
NVFP4 = Scheme("nvfp4-pack-quantized", 4, "float", strategy="tensor_group")


@pytest.mark.parametrize(
    ("scheme", "found", "fault"),
    [
        (MXFP4, {"weight_packed": ("U8", (8, 32))}, "it has no weight_scale"),
        (MXFP4, {"weight_packed": ("U8", (8, 32)), "weight_scale": ("BF16", (8, 2))}, "its weight_scale is BF16"),
        (MXFP8, {"weight_packed": ("U8", (8, 32)), "weight_scale": ("U8", (8, 2))}, "it has no weight"),
        (NVFP4, {"weight_packed": ("U8", (8, 32)), "weight_scale": ("F8_E4M3", (8, 4))}, "no weight_global_scale"),
    ],
)
def test_what_does_not_fit_is_said(scheme: Scheme, found: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        recognise(scheme, found, None)


@pytest.mark.parametrize("format", [Mx(4), Mx(8), Nvfp4()], ids=lambda format: format.label)
def test_columns_must_divide_into_groups(format: Any) -> None:
    with pytest.raises(ValueError, match="its 24 columns do not divide into groups"):
        format.parts(8, 24)
