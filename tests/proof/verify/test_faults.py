"""Planted faults: each is found, with exit code 1 and the name of what is wrong.

A damaged output is a failed check (1); a damaged source is bad input (2), because then nothing can be said of the output.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from kconvert import Recipe, convert, plan

Verify = Callable[..., Result]
Edit = Callable[[Any, Any], None]

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"  # [128, 256]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
LAST = "model.layers.2.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def check(int4: Path, bf16_copy: Path, run_verify: Verify) -> Callable[..., None]:
    """`check(*words)`: verifying the copy fails with exit code 1 and one line that says `words`."""

    def run(*words: str, code: int = 1, source: Path = int4) -> None:
        result = run_verify(source, bf16_copy)
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        message = lines[0].replace(str(bf16_copy.parent), "")  # whose name is the test's
        assert [word for word in words if word not in message] == [], message
        assert (result.exit_code, lines[0].partition(":")[0]) == (code, {1: "failed", 2: "error"}[code])
        assert "verified" not in result.stdout

    return run


def poke(tensor: Any, position: int, data: bytes) -> None:
    tensor.data = tensor.data[:position] + data + tensor.data[position + len(data) :]


def flip(tensor: Any, element: int, bit: int) -> None:
    poke(tensor, 2 * element, struct.pack("<H", struct.unpack_from("<H", tensor.data, 2 * element)[0] ^ 1 << bit))


def swap(checkpoint: Any, one: str, two: str) -> None:
    a, b = checkpoint[one], checkpoint[two]
    assert a.shape == b.shape
    a.data, b.data = b.data, a.data


@pytest.mark.parametrize("bit", [0, 7, 15], ids=["lowest", "exponent", "sign"])
@pytest.mark.parametrize(("name", "element", "where"), [(GATE, 0, "[0, 0]"), (LAST, 127 * 256 + 255, "[127, 255]")])
def test_one_flipped_bit_of_a_converted_weight_is_found(
    check: Callable[..., None], raw: Any, bf16_copy: Path, name: str, element: int, where: str, bit: int
) -> None:
    checkpoint = raw.load(bf16_copy)
    flip(checkpoint[name], element, bit)
    checkpoint.save()

    check(name, where, "compressed-tensors")


@pytest.mark.parametrize(
    ("name", "element", "where"),
    [(NORM, 100, "100"), ("model.embed_tokens.weight", 3, "3"), ("lm_head.weight", 256 + 5, "[1, 5]")],
)
def test_one_flipped_bit_of_a_copied_tensor_is_found(
    check: Callable[..., None], raw: Any, bf16_copy: Path, name: str, element: int, where: str
) -> None:
    checkpoint = raw.load(bf16_copy)
    flip(checkpoint[name], element, 0)
    checkpoint.save()

    check(name, where)


def test_two_swapped_experts_are_found(check: Callable[..., None], raw: Any, bf16_copy: Path) -> None:
    checkpoint = raw.load(bf16_copy)
    for projection in ("gate", "up", "down"):
        stem = "model.layers.1.mlp.experts.{}." + projection + "_proj.weight"
        swap(checkpoint, stem.format(2), stem.format(3))
    checkpoint.save()

    check("model.layers.1.mlp.experts.2.", "differs at [")


def test_swapped_gate_and_up_are_found(check: Callable[..., None], raw: Any, bf16_copy: Path) -> None:
    checkpoint = raw.load(bf16_copy)
    swap(checkpoint, GATE, UP)
    checkpoint.save()

    check(GATE, "differs at [")


def test_a_zeroed_router_bias_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path) -> None:
    checkpoint = raw.load(bf16_copy)
    checkpoint[BIAS].data = bytes(len(checkpoint[BIAS].data))
    checkpoint.save()

    check(BIAS, "element 0")


def test_a_cast_router_bias_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path) -> None:
    """A widely used script casts it to BF16, which reorders the experts."""
    checkpoint = raw.load(bf16_copy)
    bias = checkpoint[BIAS]
    bias.dtype, bias.data = "BF16", b"".join(bias.data[i + 2 : i + 4] for i in range(0, len(bias.data), 4))
    checkpoint.save()

    check(BIAS, "BF16", "F32")


def test_a_router_bias_rounded_in_its_own_dtype_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path) -> None:
    checkpoint = raw.load(bf16_copy)
    bias = checkpoint[BIAS]
    bias.data = b"".join(b"\0\0" + bias.data[i + 2 : i + 4] for i in range(0, len(bias.data), 4))
    checkpoint.save()

    check(BIAS, "element")


@pytest.mark.parametrize("name", [LAST, NORM, BIAS, "lm_head.weight"])
def test_a_missing_tensor_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path, name: str) -> None:
    checkpoint = raw.load(bf16_copy)
    checkpoint.pop(name)
    checkpoint.save()

    check(name.removesuffix(".weight"), "missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.4.gate_proj.weight",
        "model.layers.1.mlp.experts.2.gate_proj.weight_scale",
        "model.layers.9.input_layernorm.weight",
        "mystery",
    ],
)
def test_an_extra_tensor_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path, name: str) -> None:
    checkpoint = raw.load(bf16_copy)
    checkpoint.put(name, raw.Tensor("BF16", [128, 256], bytes(2 * 128 * 256)))
    checkpoint.save()

    check(name.removesuffix(".weight").removesuffix(".weight_scale"))


def test_a_transposed_weight_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path) -> None:
    checkpoint = raw.load(bf16_copy)
    checkpoint[GATE].shape = [256, 128]
    checkpoint.save()

    check(GATE.removesuffix(".weight"), "[256, 128]", "[128, 256]")


def test_a_weight_in_another_dtype_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path) -> None:
    """Equal bits, read as F16: every value is another."""
    checkpoint = raw.load(bf16_copy)
    checkpoint[GATE].dtype = "F16"
    checkpoint.save()

    check(GATE)


def top(config: dict[str, Any], table: dict[str, Any]) -> None:
    config["quantization_config"] = table


def nested(config: dict[str, Any], table: dict[str, Any]) -> None:
    config["text_config"] = {"quantization_config": table}


def old(config: dict[str, Any], table: dict[str, Any]) -> None:
    config["compression_config"] = table


@pytest.mark.parametrize("leave", [top, nested, old])
def test_a_quantization_config_left_behind_is_found(
    check: Callable[..., None], int4: Path, bf16_copy: Path, leave: Callable[[Any, Any], None]
) -> None:
    config = json.loads((bf16_copy / "config.json").read_text())
    leave(config, json.loads((int4 / "config.json").read_text())["quantization_config"])
    (bf16_copy / "config.json").write_text(json.dumps(config))

    check("config.json", "quantis")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_output_shard_is_found(check: Callable[..., None], bf16_copy: Path, share: float) -> None:
    shard = sorted(bf16_copy.glob("*.safetensors"))[1]
    os.truncate(shard, int(share * shard.stat().st_size))

    check(shard.name)


def test_a_missing_output_shard_is_found(check: Callable[..., None], bf16_copy: Path) -> None:
    shard = sorted(bf16_copy.glob("*.safetensors"))[1]
    shard.unlink()

    check(shard.name, "missing")


def test_a_truncated_source_shard_is_bad_input(check: Callable[..., None], int4_copy: Path) -> None:
    shard = sorted(int4_copy.glob("*.safetensors"))[1]
    os.truncate(shard, 1000)

    check(shard.name, code=2, source=int4_copy)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tiktoken.model", "docs"])
def test_a_side_file_left_behind_is_found(check: Callable[..., None], bf16_copy: Path, name: str) -> None:
    path = bf16_copy / name
    if path.is_dir():
        path = next(path.iterdir())
    path.unlink()

    check(path.name, "missing")


def test_a_changed_side_file_is_found(check: Callable[..., None], int4: Path, bf16_copy: Path) -> None:
    """Even when size and time of modification are the source's."""
    path = bf16_copy / "chat_template.jinja"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    modified = (int4 / path.name).stat().st_mtime_ns
    os.utime(path, ns=(modified, modified))

    check("chat_template.jinja", "differs")


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF81])
def test_a_value_that_is_not_finite_is_found(check: Callable[..., None], raw: Any, bf16_copy: Path, bits: int) -> None:
    checkpoint = raw.load(bf16_copy)
    poke(checkpoint[LAST], 2 * (256 * 7 + 9), struct.pack("<H", bits))
    checkpoint.save()

    check(LAST, "[7, 9]")


def test_an_infinite_scale_carried_into_the_output_is_found(
    check: Callable[..., None], raw: Any, int4_copy: Path, bf16_copy: Path
) -> None:
    """Source and output agree: both are infinite. No converter should have let it pass."""
    before, after = raw.load(int4_copy), raw.load(bf16_copy)
    stem = LAST.removesuffix(".weight")
    poke(before[f"{stem}.weight_scale"], 0, struct.pack("<H", 0x7F80))
    poke(before[f"{stem}.weight_packed"], 0, b"\xff" * 16)
    poke(after[LAST], 0, struct.pack("<H", 0x7F80) * 32)
    before.save()
    after.save()

    check(LAST, "finite", source=int4_copy)


def test_a_conversion_that_was_interrupted_is_said_to_be_unfinished(
    check: Callable[..., None], int4: Path, bf16_copy: Path
) -> None:
    shutil.rmtree(bf16_copy)
    convert(plan(int4, Recipe("bf16", shard_size=1_000_000)), bf16_copy)
    for name in ("config.json", "model.safetensors.index.json"):
        (bf16_copy / name).unlink()

    check("/bf16", "finished")


def test_a_fault_outside_the_sample_is_found_without_it(
    int4: Path, bf16_copy: Path, run_verify: Verify, raw: Any
) -> None:
    """`--sample` looks at less: the exit code must not promise more."""
    checkpoint = raw.load(bf16_copy)
    flip(checkpoint[LAST], 0, 0)
    checkpoint.save()

    sampled = run_verify(int4, bf16_copy, "--sample", 0)
    assert sampled.exit_code == 0
    assert "not looked at" in sampled.stdout
    assert run_verify(int4, bf16_copy).exit_code == 1


def test_an_output_that_is_not_there_is_wrong_usage_and_no_failed_check(
    int4: Path, tmp_path: Path, run_verify: Verify
) -> None:
    result = run_verify(int4, tmp_path / "nothing", "--report", tmp_path / "report.html")
    assert result.exit_code == 2
    assert "nothing is not a directory" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_declaration_left_beside_values_is_a_fault_as_engines_read_it(
    bf16_copy: Path, check: Callable[..., None], name: str
) -> None:
    (bf16_copy / name).write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    check(name, "declares a quantisation, but no weight is quantised")
