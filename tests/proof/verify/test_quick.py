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
from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.engines.amx import Amx
from kconvert.formats.engines.mlx import Affine
from kconvert.formats.fp8 import Fp8
from kconvert.formats.packed import Packed
from kconvert.models.model import Weight
from kconvert.proof.parity import compare, faults
from kconvert.proof.parity.metrics import same_bits
from kconvert.proof.parity.oracle import decoded, is_quick, quick_values
from kconvert.proof.parity.quick import fp8 as quick_fp8
from kconvert.proof.parity.quick import int4 as quick_int4
from kconvert.proof.parity.quick import memory
from kconvert.proof.parity.rows import HEAD
from kconvert.proof.parity.witnesses import base
from kconvert.proof.parity.witnesses.base import State
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
    assert same_bits(quickly(format, state, (300, 600)), decoded(format, state, (300, 600)))


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


def encoded(format: Format, values: torch.Tensor, which: int = 0) -> tuple[State | None, State]:
    """What the quick way makes of whole weights where it finds one of those that the reference may make, and that one."""
    rows, cols = values.shape
    weight = Weight("w", "expert.gate", rows, cols, format, ())
    witness = witness_of(format)
    expected = [*witness.encodings(values, weight, 0, {})][which]
    return witness.quick_encoding(values, weight, 0, expected, (Dense(), {}), Buffers()), expected


FP8_FORMATS = [
    Fp8(strategy, scale_dtype=dtype, scale_name=name)
    for strategy in ("block", "channel")
    for dtype, name in (("F32", "weight_scale_inv"), ("BF16", "weight_scale"))
]
POWERS = [Fp8(powers=True), Fp8(scale_name="scale", scale_dtype="F8_E8M0"), Fp8(scale_dtype="U8")]
AMX_FORMATS = [Amx(bits, 2, split, mse) for bits in (4, 8) for split in ("rows", "cols") for mse in (False, True)]


@pytest.mark.parametrize("small", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("format", FP8_FORMATS + POWERS + AMX_FORMATS, ids=str)
def test_bytes_are_those_of_the_reference(format: Format, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        monkeypatch.setattr(memory, "PIECE_ELEMENTS", 7000)
    found, expected = encoded(format, awkward(256, 640) if isinstance(format, Fp8) else awkward(256, 1024))
    assert found is not None
    assert found.keys() == expected.keys()
    assert all(same_bits(found[suffix], tensor) for suffix, tensor in expected.items())


@pytest.mark.parametrize("format", FP8_FORMATS, ids=str)
def test_scales_that_are_powers_of_two_are_seen_where_nothing_says_so(format: Format) -> None:
    found, expected = encoded(format, awkward(256, 640), which=2)
    assert found is not None
    assert all(same_bits(found[suffix], tensor) for suffix, tensor in expected.items())


def test_what_the_quick_way_does_not_know_is_left_to_the_reference() -> None:
    values = awkward(256, 600)
    assert encoded(Fp8(), values)[0] is None  # short blocks
    assert not witness_of(Packed(32)).encodes_quickly
    assert not witness_of(Amx(4, mse=None)).encodes_quickly


@pytest.mark.parametrize("wrong", ["everywhere", "after the first rows"])
def test_compressed_tensors_decides_where_the_quick_way_is_wrong(
    int4: Path, bf16: Path, bf16_copy: Path, raw: Any, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    table = quick_int4._four_nibbles() ^ 1
    sound = quick_values

    def values(weight: Weight, state: State, rows: int, buffers: Buffers) -> torch.Tensor:
        if wrong == "everywhere" or rows > HEAD:
            with monkeypatch.context() as patch:
                patch.setattr(quick_int4, "_four_nibbles", lambda: table)
                return sound(weight, state, rows, buffers)
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
    sound = memory.largest
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
    monkeypatch.setattr(compare, "CHUNK_ELEMENTS", 32 * 256)


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
