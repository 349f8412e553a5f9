"""The quick way to INT4 and FP8 values gives what compressed-tensors does, which decides where it does not."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from kconvert import Recipe, convert, inspect, plan, verify
from kconvert.checkpoint.buffers import Buffers
from kconvert.formats import Format, nvfp4
from kconvert.formats.conventions import FP8_DIVISORS
from kconvert.formats.engines.amx import Amx
from kconvert.formats.engines.mlx import Affine
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.reference import fp8 as reference_fp8
from kconvert.models.model import Weight
from kconvert.proof.parity import compare, faults
from kconvert.proof.parity.metrics import same_bits
from kconvert.proof.parity.oracle import decoded, is_quick, quick_values
from kconvert.proof.parity.quick import fp8 as quick_fp8
from kconvert.proof.parity.quick import memory
from kconvert.proof.parity.rows import HEAD
from kconvert.proof.parity.witnesses import base
from kconvert.proof.parity.witnesses.base import State
from kconvert.proof.parity.witnesses.ggml import Blocks
from kconvert.proof.parity.witnesses.registry import witness_of
from kconvert.targets.amx import AmxRecipe, plan_repack

GATE = "model.layers.1.mlp.experts.2.gate_proj"  # [128, 256]


def quickly(format: Format, state: State, shape: tuple[int, int]) -> torch.Tensor:
    weight = Weight("w", "expert.gate", *shape, format, ())
    assert is_quick(weight)
    return quick_values(weight, state, shape[0], Buffers())


def test_every_int4_code_with_every_finite_scale_is_decoded_as_compressed_tensors_does() -> None:
    format = Packed(16)
    scale = torch.arange(0x7F80).to(torch.int16).view(torch.bfloat16).view(255, 128)
    words = torch.tensor([0x76543210, 0xFEDCBA98 - (1 << 32)], dtype=torch.int32).repeat(255, 128)
    state = {"weight_packed": words, "weight_scale": scale}
    assert same_bits(quickly(format, state, (255, 2048)), decoded(format, state, (255, 2048)))


def test_int4_times_its_scale_is_rounded_nowhere_where_that_is_asked_for() -> None:
    format = Packed(32)
    words = torch.randint(-(1 << 31), 1 << 31, (300, 64), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    scale = torch.randn(300, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    state = {"weight_packed": words, "weight_scale": scale}
    witness = witness_of(format)
    assert same_bits(witness.quick_products(state, 512, Buffers()), witness.products(state, (300, 512)))


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("strategy", "scale"), [("block", (3, 5)), ("channel", (300, 1)), ("tensor", (1,))])
def test_every_fp8_code_is_decoded_as_compressed_tensors_does(
    strategy: str, scale: tuple[int, ...], scale_dtype: str
) -> None:
    """Edge blocks are short."""
    format = Fp8(strategy, scale_dtype=scale_dtype)
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(300 * 600).to(torch.uint8).view(torch.float8_e4m3fn).view(300, 600)
    scales = (torch.randn(scale, generator=generator) * 4).exp2()
    state = {"weight": codes, format.scale_name: scales.bfloat16() if scale_dtype == "BF16" else scales}
    found, expected = quickly(format, state, (300, 600)), decoded(format, state, (300, 600))
    # There is more than one NaN, and torch itself has this one or that.
    assert same_bits(found.where(~found.isnan(), 0.0), expected.where(~expected.isnan(), 0.0))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64])
def test_every_affine_code_is_decoded_as_by_mlx_s_operators(group: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(group)
    words = torch.randint(0, 1 << 32, (300, 512 // 8), generator=generator).to(torch.uint32)
    scales, biases = (torch.randn(2, 300, 512 // group, generator=generator) * 0.01).to(dtype)
    state = {"weight": words, "scales": scales, "biases": biases}
    format = Affine(4, group)
    assert same_bits(quickly(format, state, (300, 512)), decoded(format, state, (300, 512)))


def awkward(rows: int, cols: int) -> torch.Tensor:
    """bf16 of all sizes: each row and column on a scale of its own, some of them zero or subnormal."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(rows, cols, generator=generator)
    values *= (torch.randn(rows, 1, generator=generator) * 8).exp2() * (
        torch.randn(cols, generator=generator) * 4
    ).exp2()
    values[3], values[4], values[:, 5] = 0.0, values[4] * 2.0**-125, -0.0
    values[:128, :128] = values[:128, :128] * 2.0**-130
    values[128:, 128:256] = 0.0
    return values.bfloat16()


FP8_FORMATS = [
    Fp8(strategy, scale_dtype=dtype, scale_name=name)
    for strategy in ("block", "channel")
    for dtype, name in (("F32", "weight_scale_inv"), ("BF16", "weight_scale"))
]
POWERS = [Fp8(powers=True), Fp8(scale_name="scale", scale_dtype="F8_E8M0"), Fp8(scale_dtype="U8")]
AMX_FORMATS = [Amx(bits, 2, split, mse) for bits in (4, 8) for split in ("rows", "cols") for mse in (False, True)]
MX_FORMATS = [Mx(4), Mx(4, "F8_E8M0", codes_dtype="I8"), Mx(8), Mx(8, scale_name="weight_scale_inv")]
# Which of the reference's encodings the quick way knows.
KNOWN = [
    *((format, 0) for format in (*FP8_FORMATS, *POWERS, *AMX_FORMATS)),
    *((format, 1) for format in FP8_FORMATS),  # scales of least squared error
    *((format, 2) for format in FP8_FORMATS),  # those that are powers of two, where nothing says so
    *((format, which) for format in MX_FORMATS for which in range(3)),
    *((format, which) for format in (Nvfp4(), Nvfp4(True)) for which in range(2)),
]


def encoded(format: Format, values: torch.Tensor, which: int) -> State:
    """What the reference makes of whole weights by its way of that number."""
    weight = Weight("w", "expert.gate", *values.shape, format, ())
    found: State = {}
    if isinstance(format, Nvfp4):
        # Codes and scales that give back no group.
        names, factor = nvfp4.NAMES[format.multiplies], torch.tensor([2.0**-14])
        found = {names[0]: torch.zeros(values.shape[0], values.shape[1] // 2, dtype=torch.uint8)}
        found |= {"weight_scale": torch.ones(values.shape[0], values.shape[1] // 16).to(torch.float8_e4m3fn)}
        found |= {names[1]: factor if format.multiplies else 1 / factor}
    return [*witness_of(format).encodings(values, weight, 0, found)][which]


def is_made_of(format: Format, values: torch.Tensor, found: State) -> bool:
    weight = Weight("w", "expert.gate", *values.shape, format, format.parts(*values.shape) and ())
    return witness_of(format).is_made_of(values, weight, 0, found, Buffers())


def values_for(format: Format) -> torch.Tensor:
    return awkward(256, 640) if isinstance(format, Fp8) else awkward(256, 1024)


@pytest.mark.parametrize(("format", "which"), KNOWN, ids=str)
def test_what_the_reference_makes_is_known_and_every_byte_of_it_counts(format: Format, which: int) -> None:
    check_every_byte(format, which, values_for(format))


@pytest.mark.parametrize(("format", "which"), [each for each in KNOWN if isinstance(each[0], Fp8)], ids=str)
@pytest.mark.parametrize("shape", [(250, 640), (256, 600), (300, 601)], ids=str)
def test_blocks_of_fp8_that_are_cut_off_at_an_edge_are_known_as_well(
    format: Format, which: int, shape: tuple[int, int]
) -> None:
    check_every_byte(format, which, awkward(*shape))


@pytest.mark.parametrize("divisor", range(1, len(FP8_DIVISORS)))
@pytest.mark.parametrize("format", FP8_FORMATS, ids=str)
def test_an_fp8_scale_that_another_beats_is_not_one_by_mse_though_its_codes_fit(format: Format, divisor: int) -> None:
    assert isinstance(format, Fp8)
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(divisor)).bfloat16()
    found = encoded(format, values, 1)
    assert is_made_of(format, values, found)
    height, width = format.block_shape(*values.shape)
    scale = found[format.scale_name].clone()
    other = reference_fp8.rule_scale(values[:height, :width].float().abs().amax(), FP8_DIVISORS[divisor], scale.dtype)
    codes = found["weight"].clone()
    codes[:height, :width] = reference_fp8.encode_by_scale(values[:height, :width], other)
    is_best, scale[0, 0] = bool(scale[0, 0] == other), other
    assert is_made_of(format, values, {"weight": codes, format.scale_name: scale}) is is_best


def check_every_byte(format: Format, which: int, values: torch.Tensor) -> None:
    found = encoded(format, values, which)
    assert is_made_of(format, values, found)
    generator = torch.Generator().manual_seed(0)
    for suffix, tensor in found.items():
        flat = tensor.contiguous().clone().view(-1).view(torch.uint8)
        places = torch.randint(len(flat), (40,), generator=generator).tolist()
        for place in [0, len(flat) - 1, *places]:
            bit = 1 << int(torch.randint(8, (1,), generator=generator))
            flat[place] ^= bit
            damaged = {**found, suffix: flat.view(tensor.dtype).view(tensor.shape)}
            assert not is_made_of(format, values, damaged) or is_right(format, values, damaged), (suffix, place, bit)
            flat[place] ^= bit


def is_right(format: Format, values: torch.Tensor, found: State) -> bool:
    """Whether the reference says that these tensors may stand for the values."""
    weight = Weight("w", "expert.gate", *values.shape, format, ())
    ways = witness_of(format).encodings(values, weight, 0, found)
    return any(
        all(same_bits(way[suffix].view(torch.uint8), tensor.view(torch.uint8)) for suffix, tensor in found.items())
        for way in ways
    )


@pytest.mark.parametrize("format", [format for format in AMX_FORMATS if not format.mse], ids=str)
def test_amx_tiles_are_decoded_as_by_the_reference(format: Format) -> None:
    state = encoded(format, awkward(256, 8192), 0)
    assert same_bits(quickly(format, state, (256, 8192)), decoded(format, state, (256, 8192)))


def test_what_the_quick_way_does_not_know_is_left_to_the_reference() -> None:
    assert not witness_of(Packed(32)).judges_quickly
    assert not witness_of(Amx(4, mse=None)).judges_quickly


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("source", [Mx(4), Nvfp4(), Nvfp4(True)], ids=str)
def test_codes_and_scales_that_were_copied_are_known_and_every_byte_of_them_counts(
    source: Format, multiplies: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (64, 128), generator=generator).to(torch.uint8)
    target, names = Nvfp4(multiplies), nvfp4.NAMES[multiplies]
    if isinstance(source, Mx):
        exponents = torch.randint(100, 110, (64, 8), generator=generator).to(torch.uint8)
        ours = {"weight_packed": codes, "weight_scale": exponents}
        scale = (exponents.float() - 105).exp2().to(torch.float8_e4m3fn).repeat_interleave(2, -1)
        factor = torch.tensor([2.0**-22])
    else:
        scale = torch.randint(1, 0x7F, (64, 16), generator=generator).to(torch.uint8).view(torch.float8_e4m3fn)
        factor = torch.tensor([2.0**-12])
        own = nvfp4.NAMES[source.multiplies]
        ours = {own[0]: codes, "weight_scale": scale, own[1]: factor if source.multiplies else 1 / factor}
    theirs = {names[0]: codes.clone(), "weight_scale": scale.clone(), names[1]: factor if multiplies else 1 / factor}
    witness = witness_of(target)
    assert witness.copies(theirs, source, ours)
    assert same_bits(decoded(source, ours, (64, 256)), decoded(target, theirs, (64, 256)))
    for suffix in theirs:
        damaged = {name: tensor.clone() for name, tensor in theirs.items()}
        damaged[suffix].view(-1).view(torch.uint8)[-1] ^= 1
        assert not witness.copies(damaged, source, ours)


@pytest.mark.parametrize(("scale", "known"), [(0x38, True), (0x01, True), (0x00, False), (0x7F, False)])
def test_copied_codes_that_are_all_zeros_may_have_any_positive_scale(scale: int, known: bool) -> None:
    codes = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes[1, 8:16] = torch.tensor([0x08, 0x80, 0, 0x88, 0, 0, 0, 8])
    ours = {"weight_packed": codes, "weight_scale": torch.full((4, 4), 127, dtype=torch.uint8)}
    scales = torch.full((4, 8), 0x38, dtype=torch.uint8)  # 1
    scales[1, 1] = scale
    theirs = {
        "weight_packed": codes.clone(),
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    assert witness_of(Nvfp4()).copies(theirs, Mx(4), ours) is known
    theirs["weight_packed"][1, 8], ours["weight_packed"][1, 8] = 0x10, 0x10
    assert witness_of(Nvfp4()).copies(theirs, Mx(4), ours) is (scale == 0x38)


@pytest.mark.parametrize("group", [32, 128, None])
def test_codes_of_int4_in_the_order_of_q4_0_are_known_and_every_byte_of_them_counts(group: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (8, 512), generator=generator).to(torch.uint8)
    scale = (torch.randn(8, 512 // (group or 512), generator=generator) * 2).exp2().bfloat16()
    scale[0, 0], scale[1, 0] = 2.0**-24 * 3, -0.0
    source, target = Packed(group), Blocks("Q4_0", 32, 18)
    words = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int32)
    halves = codes.view(8, 16, 2, 16)
    d = scale.half().repeat_interleave((group or 512) // 32, 1).unsqueeze(-1).contiguous().view(torch.uint8)
    blocks = torch.cat([d, halves[:, :, 0] | halves[:, :, 1] << 4], -1).view(8, -1)
    ours = {"weight_packed": words, "weight_scale": scale}
    witness = witness_of(target)
    assert witness.copies({"weight": blocks}, source, ours)
    products = witness_of(source).products(ours, (8, 512))
    assert same_bits(products, decoded(target, {"weight": blocks}, (8, 512)))
    for place in range(blocks.numel()):
        blocks.view(-1)[place] ^= 1 << place % 8
        assert not witness.copies({"weight": blocks}, source, ours)
        blocks.view(-1)[place] ^= 1 << place % 8


@pytest.mark.parametrize("format", [Mx(4), Nvfp4(), Nvfp4(True)], ids=str)
def test_every_e2m1_code_is_decoded_as_compressed_tensors_does(format: Format) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(200, 1)
    if isinstance(format, Mx):
        state = {
            "weight_packed": codes,
            "weight_scale": torch.arange(200).to(torch.uint8).view(-1, 1).repeat(1, 16) + 40,
        }
    else:
        scale = torch.randint(0x7F, (200, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        names, other = nvfp4.NAMES[format.multiplies], torch.tensor([0.0007 if format.multiplies else 1300.0])
        state = {names[0]: codes, "weight_scale": scale.view(torch.float8_e4m3fn), names[1]: other}
    assert same_bits(quickly(format, state, (200, 512)), decoded(format, state, (200, 512)))


def test_every_code_of_mxfp8_with_every_scale_is_decoded_as_compressed_tensors_does() -> None:
    codes = torch.arange(256 * 256).to(torch.uint8).view(torch.float8_e4m3fn).view(256, 256)
    state = {"weight": codes, "weight_scale": torch.arange(256).to(torch.uint8).view(-1, 1).repeat(1, 8)}
    found, expected = quickly(Mx(8), state, (256, 256)), decoded(Mx(8), state, (256, 256))
    # There is more than one NaN, and torch itself has this one or that.
    assert same_bits(found.where(~found.isnan(), 0.0), expected.where(~expected.isnan(), 0.0))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("offset", [-1, 1])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["exact", "amax", "mse"])
def test_an_mxfp8_scale_that_the_reference_would_not_take_is_not_known_though_its_codes_fit(
    which: int, offset: int
) -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(which)).bfloat16()
    found = encoded(Mx(8), values, which)
    assert is_made_of(Mx(8), values, found)
    for group in (0, 301, 511):
        scale, codes = found["weight_scale"].clone(), found["weight"].clone().view(-1, 32)
        step = 2.0 ** (int(scale.view(-1)[group]) + offset - 127)
        scale.view(-1)[group] += offset
        codes[group] = reference_fp8.encode_by_scale(values.view(-1, 32)[group], torch.tensor(step))
        damaged = {"weight": codes.view(64, 256), "weight_scale": scale}
        assert not is_right(Mx(8), values, damaged)
        assert not is_made_of(Mx(8), values, damaged)


@pytest.mark.parametrize("low", [0.0, 2.0**-9], ids=["both scales serve", "only the lower scale serves"])
def test_an_amax_of_448_has_the_lower_scale_in_mxfp8_only_where_it_alone_brings_back_every_value(low: float) -> None:
    values = torch.zeros(4, 64)
    values[:, 0], values[:, 1], values[1, 40] = 448, low, 3
    values = (values * torch.tensor([[1.0], [2.0**-60], [2.0**60], [2.0**-120]])).bfloat16()
    exact, by_amax = encoded(Mx(8), values, 0), encoded(Mx(8), values, 1)
    assert same_bits(exact["weight_scale"], by_amax["weight_scale"]) is (low == 0)
    assert is_made_of(Mx(8), values, exact)
    assert is_made_of(Mx(8), values, by_amax)
    mixed = {name: torch.cat([exact[name][:2], by_amax[name][2:]]) for name in exact}
    assert is_made_of(Mx(8), values, mixed) is (low == 0)


@pytest.mark.parametrize("wrong", ["everywhere", "after the first rows"])
def test_compressed_tensors_decides_where_the_quick_way_is_wrong(
    int4: Path, bf16: Path, bf16_copy: Path, raw: Any, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    sound = quick_values

    def values(weight: Weight, state: State, rows: int, buffers: Buffers) -> torch.Tensor:
        if wrong == "everywhere" or rows > HEAD:
            return sound(weight, {name: tensor + 1 for name, tensor in state.items()}, rows, buffers)
        return sound(weight, state, rows, buffers)

    monkeypatch.setattr("kconvert.proof.parity.rows.quick_values", values)
    assert not verify(int4, bf16, keep_going=True).faults
    checkpoint = raw.load(bf16_copy)
    tensor = checkpoint[f"{GATE}.weight"]
    tensor.data = tensor.data[:-1] + bytes([tensor.data[-1] ^ 1])
    checkpoint.save()
    (fault,) = verify(int4, bf16_copy, keep_going=True).faults
    assert f"'{GATE}.weight' differs at [127, 255]" in fault


def test_the_reference_decides_where_the_quick_bytes_are_wrong(
    int4: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = quick_fp8.largest
    monkeypatch.setattr(quick_fp8, "largest", lambda values, height, width: sound(values, height, width) * 2)
    assert verify(int4, fp8).weights > 0


def test_the_quick_bytes_are_not_believed_before_the_reference_has_said_the_same(
    int4: Path, fp8_copy: Path, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gates are damaged, and the quick way finds nothing wrong with anything."""
    checkpoint = raw.load(fp8_copy)
    for name in checkpoint:
        if name.endswith("gate_proj.weight") and ".experts." in name:
            checkpoint[name].data = bytes([checkpoint[name].data[0] ^ 1]) + checkpoint[name].data[1:]
    checkpoint.save()
    monkeypatch.setattr(faults, "_quickly_right", lambda rows: True)
    (first, *_) = verify(int4, fp8_copy, keep_going=True).faults
    assert ".gate_proj.weight' differs from the reference encoding at element 0" in first


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that these weights have several."""
    monkeypatch.setattr(compare, "CHUNK", 16 * 512)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["quickly", "thoroughly"])
@pytest.mark.parametrize("position", [0, 127 * 512 + 510], ids=["first", "last"])
@pytest.mark.parametrize("value", [0x3F9D, 0x7F80, 0xFF81], ids=["finite", "infinite", "nan"])
def test_a_wrong_value_is_found_in_any_chunk(
    int4: Path, bf16_copy: Path, raw: Any, run_verify: Callable[..., Result], options: Any, position: int, value: int
) -> None:
    checkpoint = raw.load(bf16_copy)
    tensor = checkpoint[f"{GATE}.weight"]
    tensor.data = tensor.data[:position] + struct.pack("<H", value) + tensor.data[position + 2 :]
    checkpoint.save()
    result = run_verify(int4, bf16_copy, *options)
    assert result.exit_code == 1
    assert f"{GATE}.weight' differs at [{position // 512}, {position % 512 // 2}]" in result.stderr


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["quickly", "thoroughly"])
def test_a_value_that_is_infinite_on_both_sides_is_found_in_any_chunk(
    int4_copy: Path, tmp_path: Path, raw: Any, run_verify: Callable[..., Result], options: Any
) -> None:
    checkpoint = raw.load(int4_copy)
    tensor = checkpoint[f"{GATE}.weight_scale"]
    tensor.data = tensor.data[:-2] + struct.pack("<H", 0x7F80)
    checkpoint.save()
    shutil.copytree(int4_copy, tmp_path / "same")
    result = run_verify(int4_copy, tmp_path / "same", *options)
    assert result.exit_code == 1
    assert f"{GATE}.weight_packed' has a value that is not finite" in result.stderr


@pytest.mark.usefixtures("small_chunks")
def test_figures_of_the_first_rows_are_told_as_such(int4: Path, fp8: Path, run_verify: Callable[..., Result]) -> None:
    assert "lost in each weight's first rows: relative Frobenius error 0.0" in run_verify(int4, fp8).stdout
    whole, few = verify(int4, fp8), verify(int4, fp8, thorough=False)
    name = GATE.replace("gate", "down")  # [256, 128]
    both = zip(whole.comparisons, few.comparisons, strict=True)
    ((one, two),) = [(a.errors, b.errors) for a, b in both if a.name == name]
    assert (one.elements, two.elements) == (256 * 128, HEAD * 128)
    assert math.isclose(one.frobenius, two.frobenius, rel_tol=0.3)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PIECE_ELEMENTS", 1000)
    monkeypatch.setattr(base, "PIECE_ELEMENTS", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("target", ["bf16", "fp8", "int8", "mxfp4", "mxfp8"])
def test_a_conversion_is_verified_in_pieces_that_are_smaller_than_its_weights(
    int4: Path, tmp_path: Path, target: str
) -> None:
    convert(plan(int4, Recipe(target)), tmp_path / "out")
    assert verify(int4, tmp_path / "out").weights > 0


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_amx_weights_are_verified_in_pieces_that_are_smaller(
    sample: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    source = sample(tmp_path / "source", moe_intermediate=512, experts=1, layers=2)
    convert(plan_repack(inspect(source), AmxRecipe(method, 2)), tmp_path / "out")
    assert verify(source, tmp_path / "out").weights == 3


@pytest.mark.usefixtures("small_pieces")
def test_int4_found_again_in_bf16_is_verified_in_pieces_that_are_smaller(bf16: Path, tmp_path: Path) -> None:
    convert(plan(bf16, Recipe("int4")), tmp_path / "out")
    assert verify(bf16, tmp_path / "out").weights > 0
