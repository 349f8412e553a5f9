"""Packed INT4 and INT8 in compressed-tensors' layout: values, codes, and the way back from values to codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from kconvert.formats import Format
from kconvert.formats.conventions import COMPRESSED_TENSORS, CONVENTIONS, KIMI, Convention
from kconvert.formats.dtypes import tensor_bytes
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.formats.reference import packed as reference

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
RULES = pytest.mark.parametrize("rule", CONVENTIONS.values(), ids=list(CONVENTIONS))
KINDS = [
    "random",
    "heavy-tailed",
    "zero",
    "negative zero",
    "denormal",
    "ties",
    "extreme",
    "decoded",
    "decoded, few codes",
]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def scheme(bits: int, symmetric: bool, group_size: int | None) -> QuantizationScheme:
    strategy = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=args)


def compress(weight: torch.Tensor, bits: int, symmetric: bool, group_size: int | None) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of a weight, scales and zero points included."""
    plan = scheme(bits, symmetric, group_size)
    groups = weight.view(len(weight), -1, group_size or weight.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), plan.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return dict(PackedQuantizationCompressor.compress(state, plan))


def groups_of(kind: str, seed: int, groups: int, size: int, rule: Convention) -> torch.Tensor:
    """bf16 [groups, size] of one kind."""
    noise = torch.Generator().manual_seed(seed)
    normal = torch.randn(groups, size, generator=noise)
    codes = torch.randint(rule.lowest, 8, (groups, size), generator=noise).float()
    scale = (torch.rand(groups, 1, generator=noise) + 2**-7).bfloat16().float()
    few = torch.where(codes.abs() < 3, codes, torch.zeros(()))
    values = {
        "random": 0.02 * normal,
        "heavy-tailed": (normal / normal.roll(1, 1)).clamp(-1e30, 1e30),
        "zero": torch.zeros(groups, size),
        "negative zero": normal.sign() * (codes == 3),
        "denormal": normal * 2.0**-130,
        "ties": (codes + 0.5) * 2.0 ** (codes[:, :1] - 7),
        "extreme": 1.984375 * normal.sign() * 2.0 ** (40 * codes.clamp(-3, 3)),
        "decoded": codes * scale,
        "decoded, few codes": few * (scale * 2.0**-132).bfloat16().float(),
    }
    return values[kind].bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "cols"), [(32, 128), (64, 128), (128, 128), (4, 12), (5, 40), (None, 128), (None, 43)]
)
def test_values_equal_compressed_tensors(
    codec: Any, bits: int, symmetric: bool, dtype: str, group_size: int | None, cols: int
) -> None:
    weight = (0.02 * torch.randn(21, cols) ** 3 + 0.01).to(DTYPES[dtype])
    state = compress(weight, bits, symmetric, group_size)
    expected = PackedQuantizationCompressor.decompress(state, scheme(bits, symmetric, group_size))["weight"]
    format = Packed(group_size, "I64", bits=bits, symmetric=symmetric, scale_dtype=dtype)
    assert same(codec.decode(format, state, 21, cols), expected.float())
    zero = state.get("weight_zero_point")
    assert same(reference.decode(state["weight_packed"], state["weight_scale"], cols, bits, zero), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "cols"), [(32, 128), (5, 40), (None, 43)])
def test_zero_points_of_old_files_are_not_packed(codec: Any, bits: int, group_size: int | None, cols: int) -> None:
    weight = (0.02 * torch.randn(21, cols) ** 3 + 0.01).bfloat16()
    state = compress(weight, bits, False, group_size)
    expected = PackedQuantizationCompressor.decompress(state, scheme(bits, False, group_size))["weight"]
    groups = state["weight_scale"].shape
    plain = unpack_from_int32(state["weight_zero_point"], bits, groups, packed_dim=0)
    assert plain.dtype == torch.int8
    assert bool(plain.any())
    format = Packed(group_size, "I64", bits=bits, symmetric=False, zero_dtype="I8")
    assert same(codec.decode(format, {**state, "weight_zero_point": plain}, 21, cols), expected.float())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_belong_to_the_groups_that_g_idx_says(codec: Any, bits: int, symmetric: bool) -> None:
    """compressed-tensors reads g_idx no more; a weight with permuted columns, decompressed and put back, is its meaning."""
    state = compress((0.02 * torch.randn(16, 64)).bfloat16(), bits, symmetric, 32)
    straight = PackedQuantizationCompressor.decompress(state, scheme(bits, symmetric, 32))["weight"]
    order = torch.randperm(64)
    codes = reference.unpack(state["weight_packed"], bits, 64)[:, order]
    shuffled = {
        **state,
        "weight_packed": reference.pack(codes, bits),
        "weight_g_idx": (order // 32).to(torch.int32),
    }
    format = Packed(32, "I64", bits=bits, symmetric=symmetric, ordered=True)
    assert same(codec.decode(format, shuffled, 16, 64), straight[:, order].float())
    zero, g_idx = state.get("weight_zero_point"), shuffled["weight_g_idx"]
    packed = shuffled["weight_packed"]
    assert same(reference.decode(packed, state["weight_scale"], 64, bits, zero, g_idx), straight[:, order])


def test_every_code_with_every_scale_gives_the_product_rounded_once(codec: Any) -> None:
    scale = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    packed = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32).expand(len(scale), 2)
    expected = (torch.arange(-8, 8).double() * scale.double().unsqueeze(1)).bfloat16().float()
    state = {"weight_packed": packed, "weight_scale": scale.unsqueeze(1)}
    finite = expected.isfinite()
    values = codec.decode(Packed(16, None), state, len(scale), 16)
    assert same(values[finite], expected[finite])


@RULES
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_kernels_quantise_as_the_reference(
    codec: Any, rule: Convention, group_size: int | None, kind: str, seed: int
) -> None:
    weight = groups_of(kind, seed, 24, 128, rule)
    tensors, lost = codec.encode(Packed(group_size, None, rule), weight)
    packed, scale = reference.encode(weight, group_size or 128, rule)
    assert same(tensors["weight_packed"], packed)
    assert same(tensors["weight_scale"], scale)
    assert lost == 0
    tensors, lost = codec.encode(Packed(group_size, None, rule, mse=True), weight)
    packed, scale = reference.encode_mse(weight, group_size or 128, rule)
    assert same(tensors["weight_packed"], packed)
    assert same(tensors["weight_scale"], scale)
    tensors, lost = codec.encode(Packed(group_size, None, rule, exact=True), weight)
    packed, scale, inexact = reference.encode_exact(weight, group_size or 128, rule)
    assert same(tensors["weight_packed"], packed)
    assert same(tensors["weight_scale"], scale)
    assert lost == inexact


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "extreme"])
def test_the_reference_quantises_as_compressed_tensors(group_size: int | None, kind: str) -> None:
    weight = groups_of(kind, 1, 64, 128, COMPRESSED_TENSORS)
    packed, scale = reference.encode(weight, group_size or 128, COMPRESSED_TENSORS)
    expected = compress(weight, 4, True, group_size)
    assert same(scale, expected["weight_scale"])
    assert same(packed, expected["weight_packed"])


def test_published_weights_decode_to_their_values(codec: Any, real_slice: tuple[str, dict[str, torch.Tensor]]) -> None:
    convention, state = real_slice
    rows, cols = state["weight"].shape
    values = codec.decode(Packed(32, None), state, rows, cols)
    expected = PackedQuantizationCompressor.decompress(state, scheme(4, True, 32))["weight"]
    assert same(values, expected.float())
    if convention == "kimi":
        assert same(values.bfloat16(), state["weight"])


def test_decoded_published_weights_encode_to_the_published_tensors(
    codec: Any, real_slice: tuple[str, dict[str, torch.Tensor]]
) -> None:
    convention, state = real_slice
    values = codec.decode(Packed(32, None), state, *state["weight"].shape)
    tensors, lost = codec.encode(Packed(32, convention=CONVENTIONS[convention], exact=True), values)
    assert all(same(tensors[suffix], state[suffix]) for suffix in ("weight_packed", "weight_scale", "weight_shape"))
    assert lost == 0


@pytest.mark.parametrize("real_slice", ["qwen_rtn_slice"], indirect=True)
def test_published_originals_encode_to_the_published_tensors(
    codec: Any, real_slice: tuple[str, dict[str, torch.Tensor]]
) -> None:
    """Of Qwen there are the weights from before quantisation; of Kimi nobody has them."""
    convention, state = real_slice
    tensors, _ = codec.encode(Packed(32, convention=CONVENTIONS[convention]), state["weight"])
    assert all(same(tensors[suffix], state[suffix]) for suffix in ("weight_packed", "weight_scale", "weight_shape"))


@RULES
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_decoded_weights_get_their_codes_and_scales_back(codec: Any, rule: Convention, group_size: int) -> None:
    noise = torch.Generator().manual_seed(0)
    weight = (torch.randn(2048, 1024, generator=noise) * torch.rand(2048, 1, generator=noise)).bfloat16()
    weight[::7, :128] = 0
    before, _ = codec.encode(Packed(group_size, None, rule), weight)
    values = codec.decode(Packed(group_size, None), before, *weight.shape)
    after, lost = codec.encode(Packed(group_size, None, rule, exact=True), values)
    assert lost == 0
    assert same(after["weight_packed"], before["weight_packed"])
    assert same(after["weight_scale"], before["weight_scale"])


def test_the_scale_is_always_next_to_the_largest_value_divided_by_the_largest_code() -> None:
    """What makes the search for an exact scale complete; over every bf16 scale."""
    scale = torch.arange(1, 0x7F80, dtype=torch.int16)
    for code in range(1, 9):
        amax = (code * scale.view(torch.bfloat16).float()).bfloat16().float()
        nearest = (amax / code).bfloat16().view(torch.int16)[amax.isfinite()]
        off = (nearest - scale[amax.isfinite()]).abs().max()
        assert off == (0 if code in (1, 2, 4, 8) else 1)


def test_groups_that_no_scale_reproduces_are_counted_and_get_the_rules_scale(codec: Any) -> None:
    weight = groups_of("decoded", 0, 64, 64, KIMI)
    weight[3, 5] = 0.3 * weight[3].abs().max()
    weight[9, 40] = 0.3 * weight[9].abs().max()
    tensors, lost = codec.encode(Packed(32, None, KIMI, exact=True), weight)
    assert lost == 2
    by_rule, _ = codec.encode(Packed(32, None, KIMI), weight)
    assert same(tensors["weight_scale"][3, 0], by_rule["weight_scale"][3, 0])
    assert same(tensors["weight_packed"][9, 4:], by_rule["weight_packed"][9, 4:])


def test_weights_made_by_compressed_tensors_rule_are_found_out_under_kimis(codec: Any) -> None:
    weight = groups_of("random", 0, 256, 64, KIMI)
    before = compress(weight, 4, True, 32)
    values = PackedQuantizationCompressor.decompress(before, scheme(4, True, 32))["weight"]
    with_lowest = (reference.unpack(before["weight_packed"], 4, 64).view(256, 2, 32) == -8).any(-1).sum()
    _, lost = codec.encode(Packed(32, None, KIMI, exact=True), values)
    assert lost == with_lowest > 100
    after, lost = codec.encode(Packed(32, None, COMPRESSED_TENSORS, exact=True), values)
    assert lost == 0
    assert same(after["weight_packed"], before["weight_packed"])


@RULES
def test_scales_with_the_least_squared_error_serve_better(codec: Any, rule: Convention) -> None:
    weight = groups_of("random", 0, 256, 64, rule)

    def noise(format: Packed) -> float:
        tensors, _ = codec.encode(format, weight)
        return float((codec.decode(format, tensors, 256, 64) - weight.float()).pow(2).sum())

    assert noise(Packed(32, None, rule, mse=True)) < 0.98 * noise(Packed(32, None, rule))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(codec: Any, exact: bool, bad: float) -> None:
    weight = torch.ones(8, 64)
    weight[5, 40] = bad
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(Packed(32, exact=exact), weight)


@pytest.mark.parametrize(
    "format",
    [
        Packed(32),
        Packed(16, scale_dtype="F16"),
        Packed(24, scale_dtype="F32", symmetric=False),
        Packed(None, bits=8),
        Packed(32, ordered=True),
        Fp8("block", (16, 32)),
        Mx(4),
        Mx(8),
    ],
    ids=lambda format: f"{format.label} {getattr(format, 'scale_dtype', '')}",
)
def test_rows_of_bf16_are_those_of_a_tile_rounded(format: Format) -> None:
    rows, cols = 48, 96
    noise, parts = np.random.default_rng(0), format.parts(rows, cols)
    data = [noise.integers(0, 127, part.nbytes, np.uint8) for part in parts]
    for part, bytes_ in zip(parts, data, strict=True):
        if part.suffix == "weight_g_idx":
            bytes_.view("i4")[:] = noise.integers(0, part.below, cols)
        elif part.values != "any":
            floats = torch.from_numpy(noise.normal(size=bytes_.size // tensor_bytes(part.dtype, (1,)))).abs() + 0.1
            whole = floats.to(DTYPES[part.dtype]) if part.dtype in DTYPES else torch.full(floats.shape, 126).byte()
            bytes_[:] = whole.view(torch.uint8).numpy()
    tile, bits = np.empty((rows, cols), np.float32), np.empty((rows, cols), np.uint16)
    format.decode(data, 0, tile)
    format.decode(data, 0, bits)
    assert format.decodes_bf16
    assert same(torch.from_numpy(tile).to(torch.bfloat16), torch.from_numpy(bits).view(torch.bfloat16))
