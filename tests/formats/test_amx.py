"""AMXINT4 and AMXINT8: the kernels, the reference in torch, and the order of bytes as kt-kernel has it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kconvert.formats.conventions import AMX_FACTORS
from kconvert.formats.engines.amx import Amx, AmxCodes, AmxScales
from kconvert.formats.reference import amx as reference

BITS = [4, 8]


@pytest.fixture
def tall(codec: Any) -> Any:
    """A codec whose tiles are whole blocks of rows."""
    tall = type(codec)()
    tall.tile_rows = 128
    return tall


def awkward(seed: int, rows: int, cols: int, power: int = 0) -> torch.Tensor:
    """Heavy-tailed bf16 values with rows of zeros, ties, subnormal and hardly normal numbers."""
    noise = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=noise) ** 3 * 2.0**power
    weight[1] = 0
    weight[2] = torch.arange(cols) % 225 / 2 - 56
    weight[2, 0] = 112
    weight[3] *= 2.0**-130 / 2.0**power
    weight[4] *= 2.0**-121 / 2.0**power
    weight[5] = 0
    weight[5, 7] = -1
    return weight.clamp(-3e38, 3e38).bfloat16()


@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from(BITS),
    mse=st.booleans(),
    split=st.sampled_from(["rows", "cols"]),
    numa=st.sampled_from([1, 2, 3]),
    power=st.integers(-133, 120),
)
@settings(max_examples=60)
def test_kernel_and_reference_pack_alike(
    tall: Any, seed: int, bits: int, mse: bool, split: Any, numa: int, power: int
) -> None:
    rows, cols = (128 * numa, 256) if split == "rows" else (128, 128 * numa)
    weight = awkward(seed, rows, cols, power)
    tensors, lost = tall.encode(Amx(bits, numa, split, mse), weight)
    assert lost == 0
    for n, shard in enumerate(weight.chunk(numa, 0 if split == "rows" else 1)):
        packed, scale = reference.encode(shard, bits, mse)
        assert torch.equal(tensors[f"numa.{n}.scale"], scale)
        assert torch.equal(tensors[f"numa.{n}.weight"], packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(128, 3584 + 256), (3584 + 128, 128), (256, 2 * 3584)])
def test_columns_past_a_block_are_packed_alike(tall: Any, bits: int, mse: bool, rows: int, cols: int) -> None:
    weight = awkward(0, rows, cols)
    tensors, _ = tall.encode(Amx(bits, mse=mse), weight)
    packed, scale = reference.encode(weight, bits, mse)
    assert torch.equal(tensors["numa.0.weight"], packed)
    assert torch.equal(tensors["numa.0.scale"], scale)


@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 10),
    cols=st.integers(1, 3),
    far=st.booleans(),
)
@settings(max_examples=40)
def test_unpacking_is_the_inverse_of_packing(seed: int, bits: int, rows: int, cols: int, far: bool) -> None:
    noise = torch.Generator().manual_seed(seed)
    shape = 32 * rows, 512 // bits * cols + 3584 * far
    codes = torch.randint(-7, 8, shape, generator=noise, dtype=torch.int8)
    packed = reference.pack(codes, bits)
    assert packed.numel() == math.prod(shape) * bits // 8
    assert torch.equal(reference.unpack(packed, *shape, bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (192, 256), (96, 3584 + 384), (160, 2 * 3584 + 128)])
def test_every_code_lies_where_the_published_formula_has_it(bits: int, rows: int, cols: int) -> None:
    codes = torch.randint(-7, 8, (rows, cols), dtype=torch.int8)
    packed = reference.pack(codes, bits).numpy().view(np.uint8)
    r, c = np.indices((rows, cols))
    block, run = 512 // bits, 512 // bits
    n0, k0 = r // block * block, c // 3584 * 3584
    height, width = np.minimum(block, rows - n0), np.minimum(3584, cols - k0)
    i, j = r - n0, c - k0
    within = j % run % 64
    place = (n0 * cols + k0 * height + i // 32 * 32 * width) * bits // 8 + j // run * 2048
    place += i % 32 // 16 * 1024 + within // 4 * 64 + i % 16 * 4 + within % 4
    found = packed[place].astype(np.int8)
    if bits == 4:
        nibble = np.where(j % run < 64, packed[place] & 15, packed[place] >> 4)
        found = np.where(nibble > 7, nibble.astype(int) - 16, nibble)
    assert (found == codes.numpy()).all()


@pytest.mark.parametrize("split", ["rows", "cols"])
@pytest.mark.parametrize("bits", BITS)
def test_decoding_gives_what_the_loader_serves(tall: Any, bits: int, split: Any) -> None:
    weight = awkward(1, 256, 256)
    format = Amx(bits, 2, split)
    tensors, _ = tall.encode(format, weight)
    shards = [
        reference.decode(tensors[f"numa.{n}.weight"], tensors[f"numa.{n}.scale"], 256 if split == "rows" else 128, bits)
        for n in range(2)
    ]
    expected = torch.cat(shards, 0 if split == "rows" else 1)
    assert torch.equal(tall.decode(format, tensors, 256, 256), expected)


def error(weight: torch.Tensor, bits: int, mse: bool) -> torch.Tensor:
    """Squared error of each row."""
    served = reference.decode(*reference.encode(weight, bits, mse), weight.shape[1], bits)
    return (weight.double() - served.double()).square().sum(-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("freedom", [3.0, 5.0, 100.0])
def test_scales_by_mse_never_lose_more_than_by_amax(bits: int, freedom: float) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(freedom).sample((64, 2048)).bfloat16()
    by_amax, by_mse = error(weight, bits, False), error(weight, bits, True)
    assert (by_mse <= by_amax * 1.0001).all()  # the nearest code is nearer than kt-kernel's; sums are rounded
    if bits == 4:
        assert by_mse.sum() < by_amax.sum() / 1.5


def test_the_search_finds_the_best_scale_there_is_or_nearly() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(5.0).sample((64, 2048)).bfloat16()
    _, amax = reference.encode(weight, 4, False)
    tried = []
    for factor in AMX_FACTORS:
        scale = amax * factor
        codes = reference.quantise(weight.float(), scale, 4, nearest=True)
        tried.append((weight.double() - (codes * 16 * scale.unsqueeze(1)).double()).square().sum(-1))
    best = torch.stack(tried).amin(0)
    assert (error(weight, 4, True) <= best * 1.02).all()


def test_values_that_are_no_bf16_are_rounded_to_one_first(tall: Any) -> None:
    weight = torch.randn(128, 128)
    ours, _ = tall.encode(Amx(4), weight)
    rounded, _ = tall.encode(Amx(4), weight.bfloat16())
    assert torch.equal(ours["numa.0.weight"], rounded["numa.0.weight"])
    assert torch.equal(ours["numa.0.scale"], rounded["numa.0.scale"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_a_value_that_is_not_finite_is_refused(tall: Any, value: float) -> None:
    weight = torch.zeros(128, 128)
    weight[77, 99] = value  # the last one becomes infinite as a bf16
    with pytest.raises(ValueError, match="not finite"):
        tall.encode(Amx(4), weight)


@pytest.mark.parametrize(
    ("format", "rows", "cols"),
    [
        (Amx(4), 64, 128),
        (Amx(4), 128, 64),
        (Amx(4, 2), 128, 128),
        (Amx(4, 2, "cols"), 128, 128),
        (Amx(8, 3, "cols"), 64, 128),
    ],
)
def test_shards_that_are_not_whole_blocks_are_refused(format: Amx, rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        format.parts(rows, cols)


@pytest.mark.parametrize("split", ["rows", "cols"])
@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_go_to_more_shards_unchanged(tall: Any, bits: int, split: Any) -> None:
    weight = awkward(2, 512, 512)
    two, four = Amx(bits, 2, split), Amx(bits, 4, split)
    tensors, _ = tall.encode(two, weight)
    codes = tall.decode(AmxCodes(two), tensors, 512, 512)
    width = 4 if split == "cols" else 1
    scales = tall.decode(AmxScales(two, 512), tensors, 512, width)
    cut = tall.encode(AmxCodes(four), codes)[0] | tall.encode(AmxScales(four, 512), scales)[0]
    served = []
    for numa, parts in ((2, tensors), (4, cut)):
        cols = 512 if split == "rows" else 512 // numa
        shards = (
            reference.decode(parts[f"numa.{n}.weight"], parts[f"numa.{n}.scale"], cols, bits) for n in range(numa)
        )
        served.append(torch.cat([*shards], 0 if split == "rows" else 1))
    assert torch.equal(*served)
