"""FP8: every code and rounding against torch, kernels against the reference, the reference against compressed-tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from hypothesis import example, given
from hypothesis import strategies as st
from numba import njit

from kconvert.formats.fp8 import Fp8
from kconvert.formats.kernels.fp8 import round_e4m3, widen_e4m3
from kconvert.formats.reference import fp8 as reference

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCK, BLOCK_BF16 = Fp8(), Fp8(scale_name="weight_scale", scale_dtype="BF16")
CHANNEL = Fp8("channel", scale_name="weight_scale", scale_dtype="BF16")
CHANNEL_F32 = Fp8("channel", scale_name="weight_scale")
TENSOR = Fp8("tensor", scale_name="weight_scale")
WRITTEN = (BLOCK, BLOCK_BF16, CHANNEL, CHANNEL_F32)
BY_MSE = tuple(replace(format, mse=True) for format in WRITTEN)


@njit
def round_all(values: Any, codes: Any) -> None:
    for i in range(len(values)):
        codes[i] = round_e4m3(values[i])


@njit
def widen_all(codes: Any, values: Any) -> None:
    for i in range(len(codes)):
        values[i] = widen_e4m3(codes[i])


def rounded(values: torch.Tensor) -> torch.Tensor:
    codes = np.zeros(values.numel(), np.uint8)
    round_all(values.numpy(), codes)
    return torch.from_numpy(codes)


def torch_rounded(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def test_every_code_widens_as_in_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = np.zeros(256, np.float32)
    widen_all(codes.numpy(), values)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(expected.isnan(), torch.from_numpy(values).isnan())
    numbers = ~expected.isnan()
    assert torch.equal(expected[numbers].view(torch.int32), torch.from_numpy(values)[numbers].view(torch.int32))


def test_every_bf16_number_rounds_as_in_torch() -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    values = values[~values.isnan()]
    assert torch.equal(rounded(values), torch_rounded(values))


def test_ties_and_their_neighbours_round_as_in_torch() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, ties, torch.tensor([448.0, 463.9, 464.0, 480.0])]).view(torch.int32)
    values = torch.cat([(near + step).clamp(min=0).view(torch.float32) for step in (-1, 0, 1)])
    values = torch.cat([values, -values])
    assert torch.equal(rounded(values), torch_rounded(values))


def encode(format: Fp8, weight: torch.Tensor) -> list[torch.Tensor]:
    """The parts of a bf16 weight, through the format in tiles of 128 rows, as the engine goes."""
    rows, cols = weight.shape
    parts = format.parts(rows, cols)
    data = [np.zeros(part.nbytes, np.uint8) for part in parts]
    for first in range(0, rows, 128):
        last = min(first + 128, rows)
        cut = [d[slice(*part.span(rows, first, last))] for part, d in zip(parts, data, strict=True)]
        assert format.encode(weight[first:last].float().numpy(), cut) == 0
    codes = torch.from_numpy(data[0]).view(torch.float8_e4m3fn).view(rows, cols)
    return [codes, torch.from_numpy(data[1]).view(DTYPES[format.scale_dtype]).view(parts[1].shape)]


def decode(format: Fp8, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16 values, through the format in tiles of 128 rows."""
    rows, cols = codes.shape
    data = [codes.reshape(-1).view(torch.uint8).numpy(), scale.reshape(-1).view(torch.uint8).numpy()]
    tile = np.full((rows, cols), np.nan, np.float32)
    for first in range(0, rows, 128):
        last = min(first + 128, rows)
        spans = [part.span(rows, first, last) for part in format.parts(rows, cols)]
        format.decode([d[slice(*span)] for d, span in zip(data, spans, strict=True)], first, tile[first:last])
    values = torch.from_numpy(tile)
    assert same(values.bfloat16().float(), values)
    return values.bfloat16()


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    assert one.dtype == two.dtype
    assert one.shape == two.shape
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def made(kind: str, rows: int, cols: int, seed: int) -> torch.Tensor:
    """bf16 values of a kind that is hard in its own way."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((rows, cols))
    values = {
        "normal": 0.02 * normal,
        "heavy": 0.02 * rng.standard_t(2, (rows, cols)),
        "zero": np.where(np.arange(rows)[:, None] // 128 % 2, 0, normal) * (np.arange(cols) // 128 % 2),
        "minus zero": -0.0 * np.abs(normal),
        "denormal": 1e-40 * normal,
        "small": 10.0 ** rng.uniform(-45, -30, (rows, cols)) * np.sign(normal),
        "extreme": np.clip(3e38 * normal, -3.38e38, 3.38e38),
        "ties": rng.choice([448.0, 17, 19, 21, 0.0009765625, -0.0029296875, 1.0625, 1.1875], (rows, cols)),
        "spread": normal * 10.0 ** rng.uniform(-9, 9, (rows, cols)),
    }[kind]
    return torch.from_numpy(values.astype(np.float32)).bfloat16()


KINDS = ("normal", "heavy", "zero", "minus zero", "denormal", "small", "extreme", "ties", "spread")


@given(
    kind=st.sampled_from(KINDS),
    format=st.sampled_from((*WRITTEN, *BY_MSE)),
    rows=st.sampled_from([1, 64, 127, 128, 129, 300, 576]),
    cols=st.sampled_from([1, 7, 64, 127, 128, 129, 384, 400]),
    seed=st.integers(0, 2**31),
)
@example(kind="normal", format=BLOCK, rows=576, cols=384, seed=0)
@example(kind="extreme", format=BLOCK_BF16, rows=129, cols=129, seed=0)
@example(kind="small", format=BLOCK_BF16, rows=129, cols=129, seed=0)
@example(kind="denormal", format=BLOCK, rows=129, cols=129, seed=0)
@example(kind="extreme", format=BY_MSE[0], rows=129, cols=129, seed=0)
@example(kind="denormal", format=BY_MSE[1], rows=129, cols=129, seed=0)
def test_kernels_equal_the_reference(kind: str, format: Fp8, rows: int, cols: int, seed: int) -> None:
    weight = made(kind, rows, cols, seed)
    codes, scale = encode(format, weight)
    block = format.block_shape(rows, cols)
    expected_codes, expected_scale = reference.encode(weight, block, DTYPES[format.scale_dtype], format.mse)
    assert same(scale, expected_scale)
    assert same(codes, expected_codes)
    assert same(decode(format, codes, scale), reference.decode(codes, scale, block))


@pytest.mark.parametrize("format", WRITTEN, ids=lambda format: f"{format.label} {format.scale_dtype}")
def test_blocks_of_zeros_take_scale_one(format: Fp8) -> None:
    codes, scale = encode(format, torch.zeros(200, 200, dtype=torch.bfloat16))
    assert bool((scale == 1).all())
    assert not codes.view(torch.uint8).any()


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("format", BY_MSE, ids=lambda format: f"{format.label} {format.scale_dtype}")
def test_scales_by_mse_have_less_error_in_every_block(kind: str, format: Fp8) -> None:
    weight = made(kind, 256, 400, 3)
    block = format.block_shape(*weight.shape)

    def errors(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        squares = (decode(format, codes, scale).double() - weight.double()).square()
        return reference.blocks_of(squares, block).sum((1, 3))

    by_amax, by_mse = errors(*encode(replace(format, mse=False), weight)), errors(*encode(format, weight))
    assert bool((by_mse <= by_amax * (1 + 1e-4)).all())  # compared in fixed point
    assert by_mse.sum() < 0.99 * by_amax.sum()


def test_a_576_row_weight_has_five_rows_of_scales() -> None:
    assert [part.shape for part in BLOCK.parts(576, 7168)] == [(576, 7168), (5, 56)]


def test_the_largest_value_of_a_block_becomes_448() -> None:
    codes, scale = encode(BLOCK, made("heavy", 256, 256, 1))
    blocks = codes.float().abs().view(2, 128, 2, 128).amax((1, 3))
    assert bool((blocks == 448).all())
    assert bool((scale > 0).all())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("format", WRITTEN, ids=lambda format: f"{format.label} {format.scale_dtype}")
def test_values_that_are_not_finite_are_refused(format: Fp8, bad: float) -> None:
    weight = made("normal", 130, 130, 0)
    weight[129, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        encode(format, weight)


def compressed_tensors_scheme(format: Fp8) -> QuantizationScheme:
    block = list(format.block) if format.strategy == "block" else None
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=format.strategy, block_structure=block)
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("shape", [(256, 256), (576, 200), (96, 130), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("format", [BLOCK_BF16, CHANNEL, TENSOR], ids=lambda format: format.label)
def test_decoding_equals_compressed_tensors(format: Fp8, dtype: str, shape: tuple[int, int]) -> None:
    format = Fp8(format.strategy, scale_name="weight_scale", scale_dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 254, shape, generator=generator).to(torch.uint8)
    codes = torch.where(codes == 127, torch.zeros_like(codes), codes).view(torch.float8_e4m3fn)
    scale = (torch.rand(format.parts(*shape)[1].shape, generator=generator) / 1000 + 1e-6).to(DTYPES[dtype])
    # In the scale's own dtype its product would be rounded to f16 where that is the dtype; ours is rounded to bf16 once.
    state = {"weight": codes, "weight_scale": scale.float() if dtype == "F16" else scale}
    expected = FloatQuantizationCompressor.decompress(state, compressed_tensors_scheme(format))["weight"]
    assert same(decode(format, codes, scale), expected.bfloat16())


def test_decoding_equals_the_block_dequantizer_of_compressed_tensors() -> None:
    codes, scale = reference.encode(made("heavy", 576, 328, 3), BLOCK.block)
    state = {"m.weight": codes, "m.weight_scale_inv": scale}
    assert same(decode(BLOCK, codes, scale), FP8BlockDequantizer().process(state)["m.weight"])


@pytest.mark.parametrize("format", [BLOCK_BF16, CHANNEL], ids=lambda format: format.label)
def test_encoding_equals_compressed_tensors_in_f32(format: Fp8) -> None:
    """Its scales are ours; its codes are, too, when it divides in f32 (in bf16 the quotient is rounded twice)."""
    weight = made("heavy", 384, 256, 4)
    scheme = compressed_tensors_scheme(format)
    amax = reference.blocks_of(weight.float().abs(), format.block_shape(384, 256)).amax((1, 3)).bfloat16()
    expected_scale, _ = calculate_qparams(-amax, amax, scheme.weights)
    state = {"weight": weight.float(), "weight_scale": expected_scale.float()}
    codes, scale = encode(format, weight)
    assert same(scale, expected_scale)
    assert same(codes, FloatQuantizationCompressor.compress(state, scheme)["weight"])


@given(seed=st.integers(0, 2**31), rows=st.sampled_from([1, 127, 129]), cols=st.sampled_from([1, 128, 200]))
def test_scales_that_are_powers_of_two_mean_what_they_do_as_floats(seed: int, rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, (rows, cols), generator=generator).to(torch.uint8)
    codes = torch.where(codes == 127, torch.zeros_like(codes), codes).view(torch.float8_e4m3fn)
    stored = torch.randint(0, 255, (-(-rows // 128), -(-cols // 128)), generator=generator).to(torch.uint8)
    stored[0, 0] = seed % 3  # the smallest is subnormal
    floats = stored.view(torch.float8_e8m0fnu).float()
    for dtype in ("F8_E8M0", "U8"):
        assert same(decode(replace(BLOCK, scale_dtype=dtype), codes, stored), decode(BLOCK, codes, floats))


@pytest.mark.parametrize("format", [BLOCK, CHANNEL_F32, TENSOR], ids=lambda format: format.label)
@pytest.mark.parametrize("code", [0x01, 0x80 + 0x10, 0x7F, 0xFF], ids=hex)
def test_a_scale_of_zero_is_sound_over_zeros_and_over_nothing_else(format: Fp8, code: int) -> None:
    codes = torch.zeros(130, 96, dtype=torch.uint8)
    codes[3, 5] = 0x80
    scale = torch.zeros(format.parts(130, 96)[1].shape)
    values = decode(format, codes.view(torch.float8_e4m3fn), scale)
    assert same(values, (codes.view(torch.float8_e4m3fn).float() * 0).bfloat16())
    codes[129, 95] = code
    with pytest.raises(ValueError, match="scale of zero over codes that are not"):
        decode(format, codes.view(torch.float8_e4m3fn), scale)


def test_the_error_of_fp8_blocks_on_gaussian_weights_is_what_the_mantissa_allows() -> None:
    weight = made("normal", 512, 512, 6)
    values = decode(BLOCK, *encode(BLOCK, weight)).float()
    error = (values - weight.float()).norm() / weight.float().norm()
    assert 0.024 < float(error) < 0.029
