"""NVFP4: kernels, reference, compressed-tensors and ModelOpt's formula have the same bytes and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import NAMES, Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.reference import mx
from kconvert.formats.reference import nvfp4 as reference

SCHEME = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
)
SPELLINGS = pytest.mark.parametrize("multiplies", [False, True])


def made_up(rows: int = 64, cols: int = 256, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed values with groups of zeros, of either sign, and of tiny ones."""
    weight = torch.distributions.StudentT(4.0).sample((rows, cols)) * 0.02 if seed == 0 else torch.randn(rows, cols)
    weight[1, :16], weight[2, :16], weight[3, :32] = 0, -0.0, 1e-12
    return weight.bfloat16()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def recoded(source: Any, target: Nvfp4, tensors: dict[str, torch.Tensor], rows: int, cols: int, reach: float) -> Any:
    """What `recode` makes of the tensors: these by suffix, and how many groups lost something."""
    given = [bits(tensors[part.suffix]).reshape(-1).numpy() for part in source.parts(rows, cols)]
    parts = target.parts(rows, cols)
    outputs = [np.zeros(part.nbytes, np.uint8) for part in parts]
    target.settle(reach, outputs)
    lost = target.recode(source, given, rows, cols, outputs)
    found = {part.suffix: torch.from_numpy(data) for part, data in zip(parts, outputs, strict=True)}
    found[NAMES[target.multiplies][0]] = found[NAMES[target.multiplies][0]].view(rows, -1)
    found["weight_scale"] = found["weight_scale"].view(torch.float8_e4m3fn).view(rows, -1)
    found[NAMES[target.multiplies][1]] = found[NAMES[target.multiplies][1]].view(torch.float32)
    return found, lost


def mxfp4(rows: int, cols: int, exponents: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of MXFP4 with these exponents [rows, cols / 32], and their values."""
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8)
    return {"weight_packed": codes, "weight_scale": exponents}, mx.decode(codes, exponents)


def formula(tensors: dict[str, torch.Tensor], multiplies: bool = False) -> torch.Tensor:
    """What the tensors spell, by torch alone."""
    codes, global_scale = NAMES[multiplies]
    scale, factor = tensors["weight_scale"].float(), tensors[global_scale].float()
    step = scale * factor if multiplies else scale / factor
    pairs = torch.stack([tensors[codes] & 15, tensors[codes] >> 4], -1).flatten(-2).long()
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([half, -half])[pairs].view(*scale.shape, 16)
    return (values * step.unsqueeze(-1)).flatten(-2).bfloat16()


@SPELLINGS
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_and_reference_make_the_same_bytes(codec: Any, multiplies: bool, mse: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = made_up(seed=seed)
    tensors, lost = codec.encode(Nvfp4(multiplies, mse=mse), weight)
    factor = reference.global_factor(float(weight.abs().max()))
    packed, scale = reference.encode(weight, factor, mse)
    codes, global_scale = NAMES[multiplies]
    assert lost == 0
    assert torch.equal(tensors[codes], packed)
    assert torch.equal(bits(tensors["weight_scale"]), bits(scale))
    assert float(tensors[global_scale]) == (factor if multiplies else 1 / factor)


def test_compressed_tensors_and_modelopt_read_the_same_values(codec: Any) -> None:
    torch.manual_seed(0)
    weight = made_up()
    ours, _ = codec.encode(Nvfp4(False), weight)
    theirs = NVFP4PackedCompressor.decompress(dict(ours), SCHEME)["weight"]
    other, _ = codec.encode(Nvfp4(True), weight)
    codes = unpack_fp4_from_uint8(other["weight"], *weight.shape, dtype=torch.float32)
    step = other["weight_scale"].float() * other["weight_scale_2"]
    product = (codes.view(len(weight), -1, 16) * step.unsqueeze(-1)).view(weight.shape).bfloat16()
    for format, tensors, expected in ((Nvfp4(False), ours, theirs), (Nvfp4(True), other, product)):
        values = codec.decode(format, tensors, *weight.shape)
        assert torch.equal(bits(values), bits(expected.float()))
    assert torch.equal(theirs.float(), product.float())


def test_scales_by_mse_have_a_smaller_error(codec: Any) -> None:
    torch.manual_seed(0)
    weight = made_up()
    errors = []
    for mse in (False, True):
        tensors, _ = codec.encode(Nvfp4(mse=mse), weight)
        errors.append(float((formula(tensors).float() - weight.float()).square().sum()))
    assert errors[1] < 0.9 * errors[0]


@SPELLINGS
def test_mxfp4_keeps_its_codes_and_values_while_exponents_are_within_17(codec: Any, multiplies: bool) -> None:
    torch.manual_seed(0)
    exponents = torch.randint(100, 118, (32, 8), dtype=torch.uint8)
    exponents[0, 0], exponents[0, 1] = 117, 100
    tensors, values = mxfp4(32, 256, exponents)
    target = Nvfp4(multiplies, exact=True, strict=True)
    found, lost = recoded(Mx(4), target, tensors, 32, 256, 6 * 2.0 ** (117 - 127))
    assert lost == 0
    assert torch.equal(found[NAMES[multiplies][0]], tensors["weight_packed"])
    assert torch.equal(found["weight_scale"].float()[:, ::2], found["weight_scale"].float()[:, 1::2])
    assert torch.equal(bits(codec.decode(target, found, 32, 256)), bits(values.float()))


def test_groups_of_mxfp4_beyond_17_are_counted_and_refused_where_all_must_be_exact(codec: Any) -> None:
    exponents = torch.full((2, 4), 110, dtype=torch.uint8)
    exponents[1, 2] = 110 - 18
    tensors, _ = mxfp4(2, 128, exponents)
    tensors["weight_packed"][1, 32:48] = 0x77
    tensors["weight_packed"][1, 40] = 0x71  # 0.5 has no half
    tensors["weight_packed"][0, :16] = 0
    values = mx.decode(tensors["weight_packed"], exponents)
    found, lost = recoded(Mx(4), Nvfp4(exact=True), tensors, 2, 128, 6 * 2.0 ** (110 - 127))
    assert lost == 1  # 6 of half the scale is 3
    served = codec.decode(Nvfp4(), found, 2, 128)
    assert (served != values.float()).sum() == 1
    with pytest.raises(ValueError, match="1 of its groups has values that no codes and scales reproduce"):
        recoded(Mx(4), Nvfp4(exact=True, strict=True), tensors, 2, 128, 6 * 2.0 ** (110 - 127))


def test_values_that_were_nvfp4_once_come_back(codec: Any) -> None:
    torch.manual_seed(0)
    weight = made_up()
    once, _ = codec.encode(Nvfp4(), weight)
    values = formula(once)
    again, lost = codec.encode(Nvfp4(exact=True, strict=True), values)
    assert lost == 0
    assert torch.equal(bits(formula(again)), bits(values))


def test_the_other_spelling_keeps_codes_and_counts_what_the_inverse_changes(codec: Any) -> None:
    torch.manual_seed(0)
    tensors, _ = codec.encode(Nvfp4(), made_up())
    exact, lost = recoded(Nvfp4(), Nvfp4(True, exact=True), tensors, 64, 256, 0)
    assert lost == 0
    assert torch.equal(exact["weight"], tensors["weight_packed"])
    changed = 0
    for half in range(1, 256, 2):  # so that 1.125 / scale is near the middle between two of bf16
        tensors["weight_global_scale"] = torch.tensor([1024 * 1.125 / (1 + half / 256)])
        found, lost = recoded(Nvfp4(), Nvfp4(True, exact=True), tensors, 64, 256, 0)
        assert lost == int((formula(found, True) != formula(tensors)).view(64, -1, 16).any(-1).sum())
        changed += lost
    assert changed


@pytest.mark.parametrize(
    ("source", "fate"),
    [
        (Mx(4), "recovered"),
        (Mx(8), "recovered"),
        (Dense("BF16"), "recovered"),
        (Packed(32), "lossy"),
        (Fp8(), "lossy"),
        (Nvfp4(True), "recovered"),
        (Nvfp4(), "lossless"),
    ],
)
def test_what_becomes_of_each_encoding(source: Any, fate: str) -> None:
    assert Nvfp4().fit(source, 256, 256, mse=False).fate(source) == fate


def test_columns_that_are_no_multiple_of_16_are_refused() -> None:
    with pytest.raises(ValueError, match="has 24 columns, which do not divide into groups of 16"):
        Nvfp4().fit(Dense("BF16"), 4, 24, mse=False)


def test_a_value_that_is_not_finite_is_refused(codec: Any) -> None:
    weight = made_up()
    weight[5, 5] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(Nvfp4(), weight)


@pytest.mark.parametrize("exponents", [range(100, 118), range(90, 118)])
def test_mxfp4_says_by_its_scales_how_far_it_reaches_unless_they_spread(exponents: range) -> None:
    scale = np.array([0, *exponents], np.uint8)
    reach = Mx(4).reach(lambda *wanted: iter([[scale]]))
    assert reach == (6 * 2.0 ** (117 - 127) if len(exponents) == 18 else None)


def test_scales_bound_the_values_of_integers_and_fp8() -> None:
    scale = np.array([0.5, -3.0], np.float32).view(np.uint8)
    assert Packed(32, scale_dtype="F32").reach(lambda *wanted: iter([[scale]])) == 24
    assert Packed(32, scale_dtype="F32", symmetric=False).reach(lambda *wanted: iter([[scale]])) == 48
    assert Fp8().reach(lambda *wanted: iter([[np.array([0.5], np.float32).view(np.uint8)]])) == 224
    assert Dense().reach(lambda *wanted: iter([])) is None
