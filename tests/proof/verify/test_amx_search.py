"""Scales of least squared error are searched again by the magnitudes of INT4 groups: with the reference's result, so that
what is not best is found."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kconvert
from kconvert.checkpoint.buffers import Buffers
from kconvert.errors import CheckFailed
from kconvert.formats.conventions import AMX_FACTORS
from kconvert.formats.packed import Packed
from kconvert.formats.reference import amx as reference
from kconvert.formats.reference import packed
from kconvert.proof.parity import faults
from kconvert.proof.parity.oracle import decoded
from kconvert.proof.parity.quick import amx, int4
from kconvert.targets.amx import AmxRecipe, plan_repack

NAME = "blk.1.ffn_up_exps.1.numa.0"


def rows_of_int4(group: int, rows: int = 64, cols: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and scales: of rows with light and heavy tails, without values, with a single one, and with codes of -8."""
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(-8, 8, (rows, cols), generator=generator).to(torch.int16)
    tails = torch.linspace(0, 3, rows).view(-1, 1)
    scale = (torch.randn(rows, cols // group, generator=generator) * tails - 8).exp2()
    codes[0] = 0
    codes[1], codes[1, 77] = 0, 5
    codes[2] = -8
    codes[3, ::2] = 0
    return packed.pack(codes, 4), (scale * torch.where(torch.arange(rows) % 7 == 6, -1, 1).view(-1, 1)).bfloat16()


@pytest.mark.parametrize("all_doubtful", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, 4])
def test_the_magnitudes_tell_the_scale_that_the_reference_finds(
    group: int, bits: int, all_doubtful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if all_doubtful:
        monkeypatch.setattr(amx, "ROUNDING", 1.0)
    words, scale = rows_of_int4(group)
    state = {"weight_packed": words, "weight_scale": scale}
    values = decoded(Packed(group), state, (64, 2048))
    levels = int4.levels(words, scale, 2048, Buffers())
    assert levels is not None
    codes, found = amx.codes_and_scale(values, bits, True, Buffers(), levels)
    wanted_codes, wanted = reference.codes_and_scale(values, bits, True)
    assert torch.equal(found, wanted)
    assert torch.equal(codes, wanted_codes)


def test_few_rows_need_the_reference_s_order() -> None:
    words, scale = rows_of_int4(32, rows=2048, cols=512)
    levels = int4.levels(words, scale, 512, Buffers())
    assert levels is not None
    values = decoded(Packed(32), {"weight_packed": words, "weight_scale": scale}, (2048, 512))
    rule = reference.rule_scale(values.float().abs().amax(-1), 4)
    _, doubtful = amx._searched_by_levels(levels, rule, 4, 512, Buffers())
    assert len(doubtful) < 20


def test_groups_too_long_to_be_counted_are_left_to_the_values() -> None:
    words, scale = rows_of_int4(256)
    assert int4.levels(words, scale, 2048, Buffers()) is None


@pytest.fixture(scope="module")
def made(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in INT4, and AMXINT4 of it with scales by `mse`."""
    folder = tmp_path_factory.mktemp("search")
    source = sample(folder / "source", moe_intermediate=512, experts=2, layers=2)
    kconvert.convert(plan_repack(kconvert.inspect(source), AmxRecipe("AMXINT4", 2, "mse")), folder / "out")
    return source, folder / "out"


def worse(row: int, places: int) -> Callable[[Any, Any, torch.Tensor], None]:
    """The row has the scale so many places from the best, and the codes that are right for it."""

    def change(codes: Any, scale: Any, values: torch.Tensor) -> None:
        factor = AMX_FACTORS[3 + places] / AMX_FACTORS[3]
        bits = struct.unpack_from("<f", scale.data, 4 * row)[0] * factor
        all_scales = torch.frombuffer(bytearray(scale.data), dtype=torch.float32)
        all_scales[row] = bits
        wrong = reference.quantise(values, all_scales, 4, nearest=True)
        codes.data, scale.data = reference.pack(wrong, 4).numpy().tobytes(), all_scales.numpy().tobytes()

    return change


def nibble(codes: Any, scale: Any, values: torch.Tensor) -> None:
    codes.data = codes.data[:-1] + bytes([codes.data[-1] ^ 0x10])


def last_bit(codes: Any, scale: Any, values: torch.Tensor) -> None:
    scale.data = bytes([scale.data[0] ^ 1]) + scale.data[1:]


CHANGES = [nibble, last_bit, worse(3, 1), worse(255, -1), worse(7, 2)]


@pytest.mark.parametrize("change", CHANGES, ids=["nibble", "last bit", "next scale", "scale before", "coarser scale"])
def test_a_fault_in_what_was_searched_is_found(
    made: tuple[Path, Path], tmp_path: Path, raw: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    """Also where only the quick way looks: as for all weights but the first of a kind."""
    source, output = made
    shutil.copytree(output, tmp_path / "out")
    checkpoint = raw.load(tmp_path / "out")
    (weight,) = (w for w in kconvert.inspect(source).weights if (w.role, w.expert) == ("expert.up", 1))
    with kconvert.open(source) as weights:
        values = weights[f"{weight.name}.weight"][:256].float()
    change(checkpoint[f"{NAME}.weight"], checkpoint[f"{NAME}.scale"], values)
    checkpoint.save()
    sound = faults._quickly_right
    said: list[bool] = []

    def listening(rows: Any) -> bool:
        said.append(sound(rows))
        return said[-1]

    monkeypatch.setattr(faults, "_quickly_right", listening)
    with pytest.raises(CheckFailed, match=NAME.replace(".", r"\.")):
        kconvert.verify(source, tmp_path / "out")
    assert False in said


def test_swapped_experts_are_found_in_what_was_searched(made: tuple[Path, Path], tmp_path: Path, raw: Any) -> None:
    source, output = made
    shutil.copytree(output, tmp_path / "out")
    checkpoint = raw.load(tmp_path / "out")
    for kind in ("weight", "scale"):
        one, two = checkpoint[f"{NAME}.{kind}"], checkpoint[f"{NAME.replace('exps.1', 'exps.0')}.{kind}"]
        one.data, two.data = two.data, one.data
    checkpoint.save()
    with pytest.raises(CheckFailed, match="differs from the reference encoding"):
        kconvert.verify(source, tmp_path / "out")
