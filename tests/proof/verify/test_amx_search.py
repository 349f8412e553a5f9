"""Scales of least squared error are searched again with the reference's result, so that what is not best is found."""

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
from kconvert.proof.parity.quick import amx
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


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, 4])
def test_the_scale_that_the_reference_finds_is_found_again(group: int, bits: int, mse: bool) -> None:
    words, scale = rows_of_int4(group)
    values = decoded(Packed(group), {"weight_packed": words, "weight_scale": scale}, (64, 2048))
    for first, cols in ((0, 2048), (1024, 512)):
        lines, found = amx.encode(values, first, cols, bits, mse, Buffers())
        codes, wanted = reference.codes_and_scale(values[:, first : first + cols].contiguous(), bits, mse)
        assert torch.equal(found, wanted)
        if bits == 8:
            assert torch.equal(lines.view(torch.int8), codes)
        tall = lines.repeat(512 // bits // 64, 1)
        order = reference.pack(codes.repeat(512 // bits // 64, 1), bits)
        assert amx.is_packed(tall, 0, tall.shape[1], order, bits)


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
