"""Faults planted in an output that is itself quantised: INT4 with the source's values, FP8 made of them.

Each is found to the bit by default, and by its error alone where the output may come from elsewhere (`--close`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from kconvert import Recipe, convert, plan

Verify = Callable[..., Result]
Damage = Callable[[Any], None]

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"
GATE, UP = EXPERT.format(2, "gate"), EXPERT.format(2, "up")  # [128, 256]
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


def packed(checkpoint: Any, module: str = GATE) -> Any:
    return checkpoint[f"{module}.weight_packed"]


def scales(checkpoint: Any, module: str = GATE) -> Any:
    return checkpoint[f"{module}.weight_scale"]


def swap(checkpoint: Any, one: str, two: str) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        a, b = checkpoint[f"{one}.{suffix}"], checkpoint[f"{two}.{suffix}"]
        a.data, b.data = b.data, a.data


def flip_high_bit(checkpoint: Any) -> None:
    """Of the code of row 3, column 5."""
    data = bytearray(packed(checkpoint).data)
    data[3 * 128 + 2] ^= 0x80
    packed(checkpoint).data = bytes(data)


def flip_low_bit(checkpoint: Any) -> None:
    data = bytearray(packed(checkpoint).data)
    data[3 * 128 + 2] ^= 0x10
    packed(checkpoint).data = bytes(data)


def double_scale(checkpoint: Any) -> None:
    """One more in the exponent of row 1's scale of columns 64 to 95."""
    scale = np.frombuffer(scales(checkpoint).data, "<u2").reshape(128, 8).copy()
    scale[1, 2] += 0x80
    scales(checkpoint).data = scale.tobytes()


def shift_scales(checkpoint: Any) -> None:
    scale = np.frombuffer(scales(checkpoint).data, "<u2").reshape(128, 8)
    scales(checkpoint).data = np.roll(scale, 1, axis=1).tobytes()


def swap_nibbles(checkpoint: Any) -> None:
    data = np.frombuffer(packed(checkpoint).data, np.uint8)
    packed(checkpoint).data = (data >> 4 | data << 4).tobytes()


def swap_gate_and_up(checkpoint: Any) -> None:
    swap(checkpoint, GATE, UP)


def swap_experts(checkpoint: Any) -> None:
    for projection in ("gate", "up", "down"):
        swap(checkpoint, EXPERT.format(2, projection), EXPERT.format(3, projection))


FAULTS: dict[Damage, str] = {
    flip_high_bit: f"{GATE}.weight_packed' differs at [3, 5]",
    flip_low_bit: f"{GATE}.weight_packed' differs at [3, 5]",
    double_scale: f"{GATE}.weight_packed' differs at [1, ",
    shift_scales: f"{GATE}.weight_packed' differs at [0, ",
    swap_nibbles: f"{GATE}.weight_packed' differs at [0, ",
    swap_gate_and_up: f"{GATE}.weight_packed' differs at [0, ",
    swap_experts: "model.layers.1.mlp.experts.2.down_proj.weight_packed' differs at [0, ",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_fault_in_int4_is_found_at_its_element(
    int4: Path, int4_copy: Path, run_verify: Verify, raw: Any, damage: Damage
) -> None:
    checkpoint = raw.load(int4_copy)
    damage(checkpoint)
    checkpoint.save()

    result = run_verify(int4, int4_copy)

    assert result.exit_code == 1
    assert FAULTS[damage] in result.stderr
    assert "compressed-tensors gives" in result.stderr


@pytest.mark.parametrize("damage", [fault for fault in FAULTS if fault is not flip_low_bit], ids=lambda d: d.__name__)
def test_a_fault_in_int4_is_found_by_its_error(
    int4: Path, int4_copy: Path, run_verify: Verify, raw: Any, damage: Damage
) -> None:
    """A flipped lowest bit is an error of one step, as large as rounding may make it: only bit equality tells."""
    checkpoint = raw.load(int4_copy)
    damage(checkpoint)
    checkpoint.save()

    result = run_verify(int4, int4_copy, "--close")

    assert result.exit_code == 1
    assert "limit of" in result.stderr


def test_a_doubled_scale_of_fp8_is_found(int4: Path, fp8_copy: Path, run_verify: Verify, raw: Any) -> None:
    checkpoint = raw.load(fp8_copy)
    tensor = checkpoint[f"{GATE}.weight_scale_inv"]
    (scale,) = struct.unpack_from("<f", tensor.data)
    tensor.data = struct.pack("<f", 2 * scale) + tensor.data[4:]
    checkpoint.save()

    exact, close = run_verify(int4, fp8_copy), run_verify(int4, fp8_copy, "--close")

    assert (exact.exit_code, close.exit_code) == (1, 1)
    assert f"{GATE}.weight_scale_inv' differs from the reference encoding at element 0" in exact.stderr
    assert GATE in close.stderr
    assert "SQNR" in close.stderr


def test_a_flipped_exponent_bit_of_fp8_is_found_by_its_error(
    int4: Path, fp8_copy: Path, run_verify: Verify, raw: Any
) -> None:
    checkpoint = raw.load(fp8_copy)
    tensor = checkpoint[f"{GATE}.weight"]
    codes = bytearray(tensor.data)
    largest = max(range(256), key=lambda element: codes[element] & 0x7F)
    codes[largest] ^= 0x40
    tensor.data = bytes(codes)
    checkpoint.save()

    result = run_verify(int4, fp8_copy, "--close")

    assert result.exit_code == 1
    assert f"furthest off at [0, {largest}]" in result.stderr


@pytest.mark.parametrize("options", [[], ["--close"]], ids=["exact", "close"])
def test_a_router_bias_that_lost_bits_is_found_whatever_decides_on_weights(
    int4: Path, fp8_copy: Path, run_verify: Verify, raw: Any, options: list[str]
) -> None:
    checkpoint = raw.load(fp8_copy)
    bias = checkpoint[BIAS]
    bias.data = b"".join(b"\0\0" + bias.data[i + 2 : i + 4] for i in range(0, len(bias.data), 4))
    checkpoint.save()

    result = run_verify(int4, fp8_copy, *options)

    assert result.exit_code == 1
    assert BIAS in result.stderr


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_a_missing_part_of_an_int4_weight_is_found(
    int4: Path, int4_copy: Path, run_verify: Verify, raw: Any, suffix: str
) -> None:
    checkpoint = raw.load(int4_copy)
    checkpoint.pop(f"{GATE}.{suffix}")
    checkpoint.save()

    result = run_verify(int4, int4_copy)

    assert result.exit_code == 1
    assert GATE in result.stderr


def test_a_weight_shape_that_says_another_shape_is_found(
    int4: Path, int4_copy: Path, run_verify: Verify, raw: Any
) -> None:
    checkpoint = raw.load(int4_copy)
    checkpoint[f"{GATE}.weight_shape"].data = struct.pack("<2i", 256, 128)
    checkpoint.save()

    result = run_verify(int4, int4_copy)

    assert result.exit_code == 1
    assert f"{GATE}.weight_shape" in result.stderr


def test_a_stale_quantization_config_of_another_encoding_is_found(
    int4: Path, fp8_copy: Path, run_verify: Verify, raw: Any
) -> None:
    checkpoint = raw.load(fp8_copy)
    checkpoint.config = raw.load(int4).config
    checkpoint.save()

    assert run_verify(int4, fp8_copy).exit_code == 1


def test_a_truncated_shard_of_int4_is_found(int4: Path, int4_copy: Path, run_verify: Verify) -> None:
    shard = sorted(int4_copy.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)

    result = run_verify(int4, int4_copy)

    assert result.exit_code == 1
    assert shard.name in result.stderr


def test_a_difference_in_a_weight_that_was_never_quantised_is_the_source_s_word_against_it(
    int4: Path, bf16_copy: Path, run_verify: Verify, raw: Any
) -> None:
    checkpoint = raw.load(bf16_copy)
    tensor = checkpoint["lm_head.weight"]
    tensor.data = bytes([tensor.data[0] ^ 1]) + tensor.data[1:]
    checkpoint.save()

    result = run_verify(int4, bf16_copy)

    assert "lm_head.weight' differs at [0, 0]" in result.stderr
    assert "the source gives" in result.stderr


def test_int4_that_gives_back_every_value_may_spell_it_in_another_way(
    bf16_copy: Path, tmp_path: Path, raw: Any, run_verify: Verify
) -> None:
    """A group of 0.5 and -0.5 is 4 and -4 times 1/8 as well as 1 and -1 times 1/2."""
    source = raw.load(bf16_copy)
    tensor = source[f"{GATE}.weight"]
    tensor.data = struct.pack("<32H", *[0x3F00, 0xBF00] * 16) + tensor.data[64:]
    source.save()
    convert(plan(bf16_copy, Recipe("int4")), tmp_path / "int4")
    output = raw.load(tmp_path / "int4")
    for code, scale in ((4, 0.125), (1, 0.5)):
        packed(output).data = bytes([(8 - code) << 4 | (8 + code)]) * 16 + packed(output).data[16:]
        scales(output).data = struct.pack("<f", scale)[2:] + scales(output).data[2:]
        output.save()
        assert run_verify(bf16_copy, tmp_path / "int4").exit_code == 0
    scales(output).data = struct.pack("<f", 1.0)[2:] + scales(output).data[2:]
    output.save()
    assert "differs from the reference encoding" in run_verify(bf16_copy, tmp_path / "int4").stderr
