"""Scales that are powers of two: whose rule makes them, and which values come back from FP8 and MX to the bit."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.formats.reference import fp8 as fp8_reference
from kconvert.formats.reference import mx as mx_reference

POWERS = Fp8(powers=True, exact=True)
LAYOUTS = (POWERS, replace(POWERS, scale_dtype="F8_E8M0", scale_name="scale"), replace(POWERS, scale_dtype="BF16"))
CHANNEL = Fp8("channel", scale_name="weight_scale", scale_dtype="BF16", powers=True, exact=True)
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.uint8}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="session")
def blocks(codec: Any) -> Any:
    """`codec` in tiles that are whole blocks."""
    made = type(codec)()
    made.tile_rows = 128
    return made


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.uint8)


def mxfp4(exponents: torch.Tensor, seed: int = 0, without_six: bool = False) -> torch.Tensor:
    """bf16 values of MXFP4 with these biased exponents [rows, groups]; 6 or -6 in each group, unless it is to have none."""
    noise = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (*exponents.shape, 32), generator=noise)
    if without_six:
        codes[(codes % 8) > 5] = 0
    else:
        codes[..., 0] = 7 + 8 * (codes[..., 1] % 2)
    values = E2M1[codes].double() * torch.pow(2.0, exponents.double() - 127).unsqueeze(-1)
    return values.flatten(1).bfloat16()


def with_spread(spread: int, rows: int = 128, cols: int = 128) -> torch.Tensor:
    """A weight in MXFP4 whose exponents go from 120 - spread to 120; one group is small, and has the smallest code, 0.5."""
    exponents = torch.full((rows, cols // 32), 120)
    exponents[rows // 2, 1] = 120 - spread
    weight = mxfp4(exponents)
    weight[rows // 2, 33] = 0.5 * 2.0 ** (120 - spread - 127)
    return weight


def deepseek_scale(amax: torch.Tensor) -> torch.Tensor:
    """DeepGEMM's `ceil_to_ue8m0` of amax / 448."""
    return torch.pow(2.0, torch.ceil(torch.log2(amax / 448.0)))


@pytest.mark.parametrize("format", LAYOUTS, ids=lambda format: format.scale_dtype)
def test_the_scale_is_amax_over_448_rounded_up_to_a_power_of_two(blocks: Any, format: Fp8) -> None:
    weight = (0.02 * torch.randn(256, 384, generator=torch.Generator().manual_seed(1))).bfloat16()
    weight[0, 0], weight[0, 200] = (
        448 * 2.0**-9,
        1.7578125 * 2.0**-1,
    )  # just 448 times a power of two, and a little more
    tensors, lost = blocks.encode(format, weight)
    amax = fp8_reference.blocks_of(weight.float(), (128, 128)).abs().amax((1, 3))
    scale, stored = deepseek_scale(amax), tensors[format.scale_name]
    widened = torch.pow(2.0, stored.double() - 127).float() if format.scale_dtype == "F8_E8M0" else stored.float()
    assert torch.equal(widened, scale)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = (weight.float() * (1 / spread)).to(torch.float8_e4m3fn)
    assert torch.equal(tensors["weight"].view(torch.uint8), expected.view(torch.uint8))
    assert lost == 6


def hard(kind: str, rows: int, cols: int, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, cols, generator=noise)
    groups = torch.randint(0, 255, (rows, -(-cols // 32)), generator=noise)
    made = {
        "normal": 0.02 * normal,
        "zero": -0.0 * normal.abs(),
        "denormal": 1e-40 * normal,
        "extreme": (3e38 * normal).clamp(-3.38e38, 3.38e38),
        "wide": normal * torch.pow(10.0, 60 * torch.rand(rows, cols, generator=noise) - 30),
        "mxfp4": mxfp4(110 + groups % 17, seed)[:, :cols].float(),
        "tiny mxfp4": mxfp4(groups % 12, seed)[:, :cols].float(),
        "huge mxfp4": mxfp4(240 + groups % 13, seed)[:, :cols].float(),
    }[kind]
    return made.bfloat16()


KINDS = ("normal", "zero", "denormal", "extreme", "wide", "mxfp4", "tiny mxfp4", "huge mxfp4")


@given(
    kind=st.sampled_from(KINDS),
    format=st.sampled_from((*LAYOUTS, CHANNEL)),
    rows=st.sampled_from([1, 127, 129, 576]),
    cols=st.sampled_from([1, 7, 128, 129, 400]),
    seed=st.integers(0, 2**31),
)
def test_kernels_and_reference_agree_and_count_alike(
    blocks: Any, kind: str, format: Fp8, rows: int, cols: int, seed: int
) -> None:
    weight = hard(kind, rows, cols, seed)
    tensors, lost = blocks.encode(format, weight)
    block = format.block_shape(rows, cols)
    codes, scale = fp8_reference.encode(weight, block, TORCH[format.scale_dtype], powers=True)
    assert torch.equal(tensors["weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(tensors[format.scale_name], scale)
    served = blocks.decode(format, tensors, rows, cols)
    differs = (bits_of(served) != bits_of(weight.float())).float()
    assert lost == int((fp8_reference.blocks_of(differs, block).amax((1, 3)) > 0).sum())


@pytest.mark.parametrize("shape", [(128, 128), (576, 416), (130, 96)], ids=str)
@pytest.mark.parametrize("format", LAYOUTS, ids=lambda format: format.scale_dtype)
def test_mxfp4_comes_back_from_fp8_where_exponents_spread_by_14(
    blocks: Any, format: Fp8, shape: tuple[int, int]
) -> None:
    for spread, lost in ((0, 0), (14, 0), (15, 1)):
        weight = with_spread(spread, *shape)
        tensors, count = blocks.encode(format, weight)
        assert count == lost
        same = bits_of(blocks.decode(format, tensors, *shape)) == bits_of(weight.float())
        assert bool(same.all()) == (not lost)


def test_the_scale_of_mxfp4_is_that_of_its_largest_group_over_64(blocks: Any) -> None:
    exponents = torch.randint(112, 121, (256, 8), generator=torch.Generator().manual_seed(3))
    tensors, lost = blocks.encode(LAYOUTS[1], mxfp4(exponents))
    assert lost == 0
    largest = exponents.view(2, 128, 2, 4).amax((1, 3))
    assert torch.equal(tensors["scale"].int(), largest - 6)


def test_groups_of_zeros_do_not_count_for_the_spread(blocks: Any) -> None:
    exponents = torch.full((128, 4), 120)
    weight = mxfp4(exponents)
    weight[:, 32:64] = -0.0  # whatever their scale was
    tensors, lost = blocks.encode(POWERS, weight)
    assert lost == 0
    assert torch.equal(bits_of(blocks.decode(POWERS, tensors, 128, 128)), bits_of(weight.float()))


@pytest.mark.parametrize(("exponent", "code"), [(0, 6.0), (1, 0.5), (252, 6.0), (253, 3.0), (254, 1.5)])
def test_mxfp4_at_the_ends_of_its_exponents_comes_back(blocks: Any, codec: Any, exponent: int, code: float) -> None:
    weight = torch.full((128, 128), code * 2.0 ** (exponent - 127), dtype=torch.float64).bfloat16()
    weight[:, 1::2] = -weight[:, 1::2] / code * 0.5
    weight[:, 2::4] = -0.0
    for format, coder in ((LAYOUTS[1], blocks), (Mx(8, exact=True), codec), (Mx(4, exact=True), codec)):
        tensors, lost = coder.encode(format, weight)
        assert lost == 0
        assert torch.equal(bits_of(coder.decode(format, tensors, 128, 128)), bits_of(weight.float()))


def test_strict_blocks_are_refused_with_their_number(blocks: Any) -> None:
    with pytest.raises(ValueError, match="1 of its blocks have values that no codes and power of two reproduce"):
        blocks.encode(replace(POWERS, strict=True), with_spread(15))
    with pytest.raises(ValueError, match="2 of its groups have values that no codes and power of two reproduce"):
        blocks.encode(Mx(4, exact=True, strict=True), torch.tensor([[1.0, 1.25] * 32]).bfloat16())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_refused(blocks: Any, bad: float) -> None:
    weight = with_spread(3)
    weight[100, 100] = bad
    with pytest.raises(ValueError, match="not finite"):
        blocks.encode(POWERS, weight)


@given(seed=st.integers(0, 2**31), low=st.integers(0, 252), width=st.integers(0, 60), without_six=st.booleans())
def test_every_group_of_mxfp4_comes_back_from_mxfp4_and_mxfp8(
    codec: Any, seed: int, low: int, width: int, without_six: bool
) -> None:
    noise = torch.Generator().manual_seed(seed)
    exponents = torch.randint(low, min(low + width, 252) + 1, (16, 4), generator=noise)
    weight = mxfp4(exponents, seed, without_six)
    for bits in (4, 8):
        tensors, lost = codec.encode(Mx(bits, exact=True), weight)
        assert lost == 0
        assert torch.equal(bits_of(codec.decode(Mx(bits), tensors, 16, 128)), bits_of(weight.float()))


@given(seed=st.integers(0, 2**31), bits=st.sampled_from([4, 8]), kind=st.sampled_from(KINDS))
def test_kernels_and_reference_of_mx_agree_and_count_alike(codec: Any, seed: int, bits: int, kind: str) -> None:
    weight = hard(kind, 16, 128, seed)
    format, name = Mx(bits, exact=True), "weight_packed" if bits == 4 else "weight"
    tensors, lost = codec.encode(format, weight)
    codes, scale = mx_reference.encode(weight, bits, exact=True)
    assert torch.equal(tensors[name].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(tensors["weight_scale"], scale)
    differs = bits_of(codec.decode(format, tensors, 16, 128)) != bits_of(weight.float())
    if bits == 4:  # zeros keep their sign only where all else comes back
        differs &= ~((weight == 0) & (codec.decode(format, tensors, 16, 128) == 0))
    assert lost == int(differs.view(16, 4, 32).any(-1).sum())


@given(seed=st.integers(0, 2**31))
def test_mxfp8_of_any_maker_comes_back(codec: Any, seed: int) -> None:
    """Also where a group has 448, which the rule does not use, beside the smallest codes."""
    noise = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, (16, 4, 32), generator=noise).to(torch.uint8)
    codes[:, 0, :3] = torch.tensor([126, 1, 3]).to(torch.uint8)
    scale = torch.randint(1, 240, (16, 4), generator=noise).to(torch.uint8)
    weight = mx_reference.decode(codes.flatten(1).view(torch.float8_e4m3fn), scale)
    tensors, lost = codec.encode(Mx(8, exact=True), weight)
    assert lost == 0
    assert torch.equal(bits_of(codec.decode(Mx(8), tensors, 16, 128)), bits_of(weight.float()))


SOURCES = {
    "mxfp4": Mx(4),
    "mxfp8": Mx(8),
    "bf16": Dense(),
    "int4": Packed(32),
    "fp8": Fp8(),
    "e8m0": Fp8(scale_dtype="F8_E8M0"),
}


@pytest.mark.parametrize(
    ("target", "fates"),
    [
        (Fp8(), "recovered recovered lossy lossy lossless lossless"),
        (Fp8(powers=True), "recovered recovered recovered lossy lossy lossless"),
        (Fp8(strict=True), "recovered recovered recovered recovered lossless lossless"),
        (Mx(4), "lossless recovered recovered lossy lossy recovered"),
        (Mx(8), "lossless lossless recovered lossy lossy recovered"),
    ],
    ids=["fp8", "fp8 by powers", "fp8 or nothing", "mxfp4", "mxfp8"],
)
def test_what_becomes_of_the_values_is_known_before_they_are_read(target: Any, fates: str) -> None:
    told = {name: target.fit(source, 128, 128, mse=False).fate(source) for name, source in SOURCES.items()}
    assert told == dict(zip(SOURCES, fates.split(), strict=True))


def test_subnormal_codes_of_e4m3_come_back(blocks: Any) -> None:
    """The spread of 14 is the last at which the smallest code of e2m1 is one of e4m3, its smallest."""
    tensors, lost = blocks.encode(POWERS, with_spread(14))
    assert lost == 0
    magnitudes = tensors["weight"].view(torch.uint8) & 0x7F
    assert int(magnitudes[magnitudes > 0].min()) == 1
    assert struct.pack("<f", float(tensors["weight_scale_inv"])) == struct.pack("<f", 2.0 ** (120 - 127 - 6))
