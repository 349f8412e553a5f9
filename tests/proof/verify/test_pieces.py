"""Weights larger than what is looked at in one go: faults in any piece are found, and figures are those of the whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kconvert import Recipe, convert, inspect, plan, verify
from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.gguf_files import is_gguf
from kconvert.checkpoint.safetensors import Tensor
from kconvert.formats.engines.mlx import Affine
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.proof.parity import compare, metrics, rows
from kconvert.proof.parity.metrics import measure, same_bits
from kconvert.proof.parity.quick import e2m1
from kconvert.proof.parity.quick.fp8 import largest
from kconvert.proof.parity.witnesses.base import count_bytes
from kconvert.proof.parity.witnesses.registry import witness_of
from kconvert.proof.verify import _open_output, _open_source
from kconvert.targets.amx import AmxRecipe, plan_repack

TARGETS = [
    "bf16",
    "fp8",
    "fp8 by mse",
    "int8",
    "mxfp4",
    "mxfp8",
    "mxfp8 by mse",
    "nvfp4",
    "nvfp4 of mxfp4",
    "mlx",
    "gguf",
    "AMXINT4",
    "AMXINT8",
]
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The source and the output of that name, converted once; look, do not touch."""
    root, outputs = tmp_path_factory.mktemp("pieces"), {"int4": int4}

    def make(target: str) -> tuple[Path, Path]:
        to, _, other = target.partition(" of ")
        to, scales = to.split(" by ") if " by " in to else (to, "amax")
        source = make(other)[1] if other else int4
        if target not in outputs:
            outputs[target] = root / target.replace(" ", "-")
            amx = to.startswith("AMX")
            work = plan_repack(inspect(source), AmxRecipe(to, 1)) if amx else plan(source, Recipe(to, scales=scales))
            convert(work, outputs[target])
        return source, outputs[target]

    return make


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 rows of these weights, or as many as belong together; 12 of BF16 are read at a time, and more of what is smaller."""
    monkeypatch.setattr(rows, "PIECE_ELEMENTS", 8 * 256)
    monkeypatch.setattr(compare, "CHUNK", 12 * 512)


def codes_of(source: Path, output: Path) -> tuple[Path, Tensor]:
    """Where the codes of some expert's down projection lie."""
    whole, original = _open_source(source, (), ())
    model = _open_output(original, whole, output, False)[1]
    weight = next(weight for weight in model.weights if weight.role == "expert.down" and weight.expert == 1)
    tensor = max(weight.tensors, key=lambda tensor: tensor.nbytes)
    return model.checkpoint.reader().path(tensor.file), tensor


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("thorough", [False, True], ids=["quickly", "thoroughly"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_code_is_found_in_the_first_the_last_and_a_middle_piece(
    made: Made, tmp_path: Path, target: str, thorough: bool
) -> None:
    source, sound = made(target)
    output = tmp_path / sound.name
    shutil.copytree(sound, output, ignore=shutil.ignore_patterns(".kconvert"))
    assert is_gguf(output) == (target == "gguf")
    path, tensor = codes_of(source, output)
    for place in (2, tensor.nbytes // 2 + 2, tensor.nbytes - 2):
        with path.open("r+b") as file:
            right = os.pread(file.fileno(), 1, tensor.start + place)
            os.pwrite(file.fileno(), bytes([right[0] ^ 1]), tensor.start + place)
            (fault, *more) = verify(source, output, keep_going=True, thorough=thorough).faults
            os.pwrite(file.fileno(), right, tensor.start + place)
        assert tensor.name in fault, place
        assert not more
    assert not verify(source, output, thorough=thorough).faults


@pytest.mark.parametrize("target", TARGETS)
def test_the_figures_of_pieces_are_those_of_the_whole(made: Made, request: pytest.FixtureRequest, target: str) -> None:
    whole = verify(*made(target))
    request.getfixturevalue("small_pieces")
    pieces = verify(*made(target))
    assert pieces.comparisons == whole.comparisons
    assert pieces.spreads == whole.spreads
    assert pieces.worst == whole.worst


def test_sums_of_very_many_rows_are_of_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(100, 8, generator=generator)
    found = expected + torch.randn(100, 8, generator=generator) * 0.01
    whole, by_sqnr = measure(expected, found)
    monkeypatch.setattr(metrics, "LOT", 32)
    measured = metrics.Measured()
    for first, last in ((0, 20), (20, 32), (32, 40), (40, 90), (90, 100)):
        measured.add(expected[first:last], found[first:last], first)
    errors, rows_by_sqnr = measured.result()
    assert (errors.elements, errors.different, errors.worst) == (whole.elements, whole.different, whole.worst)
    assert (errors.max_abs, errors.max_relative, rows_by_sqnr) == (whole.max_abs, whole.max_relative, by_sqnr)
    assert (errors.signal, errors.cross, errors.noise) == pytest.approx((whole.signal, whole.cross, whole.noise), 1e-12)


@pytest.mark.parametrize("step", [0.25, 0.0, -0.25, -0.0, 2.0**-133, 2.0**122, float("inf")])
@pytest.mark.parametrize("low", [0, 8])
def test_codes_of_int4_in_mlx_are_certain_only_where_every_value_is_the_same(step: float, low: int) -> None:
    generator = torch.Generator().manual_seed(low)
    codes = torch.randint(low, 16, (4, 64), generator=generator).to(torch.uint8)
    words = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)
    scale = torch.rand(4, 2, generator=generator).add(0.5).bfloat16()
    scale[1, 1] = step
    source = {"weight_packed": words, "weight_scale": scale}
    found = {"weight": words.view(torch.uint32), "scales": scale, "biases": scale * -8}
    ours, theirs = witness_of(Packed(32)), witness_of(Affine(4, 32))
    values = ours.quick_values(source, 64, Buffers()), theirs.quick_values(found, 64, Buffers())
    certain = theirs.copies(found, Packed(32), source)
    assert certain <= same_bits(*values)
    assert certain == (step in (0.25, 2.0**-133) or (low == 8 and str(step) == "0.0"))
    for name, sound in found.items():
        other = {**found, name: sound.clone()}
        other[name].view(torch.uint8)[2, 1] ^= 1
        assert not theirs.copies(other, Packed(32), source)


def test_powers_are_the_steps_of_nvfp4_where_each_is_there_twice_or_codes_are_zeros() -> None:
    powers = torch.tensor([[120, 121], [127, 0]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 0.5, 1.0, 1.0], [64.0, 64.0, 1.0, 2.0]]).to(torch.float8_e4m3fn)
    packed = torch.full((2, 32), 0x21, dtype=torch.uint8)
    packed[1, 16:] = 0x80

    def same(powers: torch.Tensor = powers, scale: torch.Tensor = scale, packed: torch.Tensor = packed) -> bool:
        return e2m1.same_as_powers(powers, scale, packed, 2.0**-6, True)

    assert same()
    for number in range(8):
        other = scale.clone()
        other.view(torch.uint8).view(-1)[number] ^= 1
        assert same(scale=other) == (number >= 6)
        other.view(-1)[number] = -1.0
        assert not same(scale=other)
    for number in range(16, 32):
        other = packed.clone()
        other[1, number] = 0x10
        assert not same(packed=other)
    infinite = powers.clone()
    infinite[1, 1] = 255
    assert not same(infinite)


def test_a_copy_of_mxfp4_in_nvfp4_is_what_its_witness_says() -> None:
    packed, powers = torch.full((1, 16), 0x21, dtype=torch.uint8), torch.tensor([[127]], dtype=torch.uint8)
    source = {"weight_packed": packed, "weight_scale": powers}
    scale = torch.tensor([[2.0, 2.0]]).to(torch.float8_e4m3fn)
    found = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": torch.tensor([2.0])}
    assert witness_of(Nvfp4()).copies(found, Mx(4), source)
    assert not witness_of(Nvfp4()).copies({**found, "weight_packed": packed ^ 1}, Mx(4), source)


@pytest.mark.parametrize("count", [0, 1, 3, 1001])
def test_bytes_are_counted_as_torch_counts_them(count: int) -> None:
    data = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert torch.equal(count_bytes(data), torch.bincount(data, minlength=256))


def test_the_largest_of_each_block_is_found_by_its_bits() -> None:
    values = torch.randn(8, 12, generator=torch.Generator().manual_seed(2)).bfloat16()
    values[0, :4], values[5, 11] = -0.0, -torch.inf
    expected = values.view(2, 4, 3, 4).abs().amax((1, 3))
    assert same_bits(largest(values, 4, 4), expected)
    assert torch.equal(largest(values, 1, 12), values.abs().amax(1, keepdim=True))
    short = largest(values, 5, 7)
    assert torch.equal(short[:, 1], torch.stack([values[:5, 7:].abs().amax(), values[5:, 7:].abs().amax()]))
    assert torch.equal(short[:, 0], torch.stack([values[:5, :7].abs().amax(), values[5:, :7].abs().amax()]))
