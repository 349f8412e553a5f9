"""Checkpoints to INT4: what was INT4 once comes back byte for byte, and what was not is counted or refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.dialects.compressed_tensors import packed_table
from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.reference import packed as reference

EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture
def by_rule(int4: Path, tmp_path: Path, raw: Any) -> Path:
    """`int4` with the experts' codes and scales made by compressed-tensors' rule, -8 among them."""
    checkpoint = raw.load(int4)
    rule = CONVENTIONS["compressed-tensors"]
    noise = torch.Generator().manual_seed(0)
    for name in [name for name in checkpoint if name.endswith("weight_packed")]:
        rows, words = checkpoint[name].shape
        packed, scale = reference.encode((0.02 * torch.randn(rows, 8 * words, generator=noise)).bfloat16(), 32, rule)
        checkpoint[name].data = packed.numpy().tobytes()
        checkpoint[name.replace("packed", "scale")].data = scale.view(torch.int16).numpy().tobytes()
    root: Path = checkpoint.save(tmp_path / "by rule")
    return root


def through_bf16(source: Path, root: Path, **options: Any) -> tuple[Path, dict[str, int]]:
    """`source` to BF16 and back to INT4: the output, and the groups that could not be recovered."""
    convert(plan(source, Recipe("bf16", "int4")), root / "bf16")
    return root / "back", convert(plan(root / "bf16", Recipe("int4", "bf16", **options)), root / "back")


def tensors(root: Path, raw: Any) -> dict[str, Any]:
    checkpoint = raw.load(root)
    return {name: checkpoint[name] for name in sorted(checkpoint)}


def test_a_kimi_checkpoint_comes_back_byte_for_byte(int4: Path, tmp_path: Path, raw: Any) -> None:
    back, inexact = through_bf16(int4, tmp_path, require_exact=True)
    assert inexact == {}
    assert tensors(back, raw) == tensors(int4, raw)
    assert raw.load(back).config == raw.load(int4).config
    verify(tmp_path / "bf16", back)


def test_a_checkpoint_by_compressed_tensors_rule_comes_back_under_its_convention(
    by_rule: Path, tmp_path: Path, raw: Any
) -> None:
    back, inexact = through_bf16(by_rule, tmp_path, convention="compressed-tensors", require_exact=True)
    assert inexact == {}
    assert tensors(back, raw) == tensors(by_rule, raw)
    verify(tmp_path / "bf16", back)


def test_a_checkpoint_by_compressed_tensors_rule_is_found_out_under_kimis(by_rule: Path, tmp_path: Path) -> None:
    _, inexact = through_bf16(by_rule, tmp_path)
    assert inexact.keys() == {w.name for w in inspect(by_rule).weights if w.role.startswith("expert")}
    verify(tmp_path / "bf16", tmp_path / "back")


def test_require_exact_names_the_weight_and_leaves_its_shard_unwritten(
    bf16_copy: Path, tmp_path: Path, raw: Any
) -> None:
    checkpoint = raw.load(bf16_copy)
    tensor = checkpoint[f"{EXPERT}.weight"]
    values = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16).clone()
    values[77] = 1.01 * values[64:96].abs().max()
    tensor.data = values.view(torch.int16).numpy().tobytes()
    checkpoint.save()
    chosen = Recipe("int4", "bf16", require_exact=True)
    with pytest.raises(
        KconvertError, match=rf"{EXPERT}' cannot be written as int4 group 32: 1 of its groups .* in rows 0 to "
    ):
        convert(plan(bf16_copy, chosen), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    shard = next(shard.name for shard in plan(bf16_copy, chosen).shards if f"{EXPERT}.weight_packed" in shard.tensors)
    assert not (tmp_path / "out" / shard).exists()
    assert convert(plan(bf16_copy, Recipe("int4", "bf16")), tmp_path / "counted") == {EXPERT: 1}


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_other_group_sizes_declare_themselves(bf16: Path, tmp_path: Path, group_size: int) -> None:
    convert(plan(bf16, Recipe("int4", "bf16", group_size=group_size)), tmp_path / "out")
    model = inspect(tmp_path / "out")
    labels = {weight.format.label for weight in model.weights if weight.role.startswith("expert")}
    assert labels == {f"int4 group {group_size}"}
    verify(bf16, tmp_path / "out")


def test_a_group_size_that_does_not_divide_is_an_error_naming_the_weight(bf16: Path) -> None:
    with pytest.raises(KconvertError, match=r"experts\.0\..*columns, which do not divide into groups of 96"):
        plan(bf16, Recipe("int4", "bf16", group_size=96))


def test_ignore_has_the_published_patterns_only_where_they_say_just_what_is_meant() -> None:
    expert, others = "model.layers.1.mlp.experts.0.up_proj", ["lm_head", "model.layers.1.self_attn.o_proj"]
    assert "re:.*self_attn.*" in packed_table(32, [expert], others)["ignore"]
    assert packed_table(32, [expert], [*others, "vision.proj"])["ignore"] == [*others, "vision.proj"]
    assert packed_table(32, [expert, "model.layers.0.mlp.up_proj"], others)["ignore"] == others


@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_a_scale_of_zero_over_codes_that_are_not_is_an_error_naming_the_weight(
    int4_copy: Path, tmp_path: Path, raw: Any, target: str
) -> None:
    checkpoint = raw.load(int4_copy)
    scale, packed = checkpoint[f"{EXPERT}.weight_scale"], checkpoint[f"{EXPERT}.weight_packed"]
    columns = scale.shape[1]
    scale.data = scale.data[: 2 * (3 * columns + 1)] + bytes(2) + scale.data[2 * (3 * columns + 2) :]
    assert packed.data[(3 * columns + 1) * 16 : (3 * columns + 2) * 16] != b"\x88" * 16
    checkpoint.save()
    said = rf"'{EXPERT}' cannot be read as int4 .* scale of zero over codes that are not zero in rows .*; its file is damaged"
    with pytest.raises(KconvertError, match=f"{said} or was written wrongly: fetch it again, or have it made anew$"):
        convert(plan(int4_copy, Recipe(target)), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_fp8_goes_to_int4_by_the_rule_with_nothing_promised(int4: Path, tmp_path: Path) -> None:
    convert(plan(int4, Recipe("fp8", "int4")), tmp_path / "fp8")
    made = plan(tmp_path / "fp8", Recipe("int4", "fp8"))
    assert made.facts["lossy"]
    assert not made.facts["recovered"]
    assert convert(made, tmp_path / "out") == {}
    verify(tmp_path / "fp8", tmp_path / "out")


def test_a_bf16_checkpoint_is_asked_for_and_an_int4_one_given(int4: Path) -> None:
    with pytest.raises(KconvertError, match="is int4 group 32, not bf16"):
        plan(int4, Recipe("int4", "bf16"))


def test_commands_recover_int4_and_say_so(bf16: Path, tmp_path: Path, kconvert: Any) -> None:
    run = kconvert("bf16-to-int4", bf16, tmp_path / "out", "--require-exact")
    assert run.returncode == 0, run.stderr
    assert "every value was reproduced exactly" in run.stdout
    run = kconvert("bf16-to-int4", bf16, tmp_path / "wide", "--group-size", 64, "--json")
    assert run.returncode == 0, run.stderr
    assert sum(json.loads(run.stdout)["inexact_groups"].values()) > 0
    run = kconvert("bf16-to-int4", bf16, tmp_path / "wide", "--group-size", 64, "--require-exact", "--overwrite")
    assert run.returncode == 2
    assert "no codes and bf16 scale reproduce" in run.stderr


def test_a_value_that_is_not_finite_is_an_error_naming_the_weight(bf16_copy: Path, tmp_path: Path, raw: Any) -> None:
    checkpoint = raw.load(bf16_copy)
    tensor = checkpoint[f"{EXPERT}.weight"]
    tensor.data = struct.pack("<H", 0x7F80) + tensor.data[2:]
    checkpoint.save()
    with pytest.raises(KconvertError, match=rf"{EXPERT}.*not finite"):
        convert(plan(bf16_copy, Recipe("int4", "bf16")), tmp_path / "out")


def test_scales_by_mse_serve_better_and_the_gain_is_printed(bf16: Path, tmp_path: Path, kconvert: Any) -> None:
    run = kconvert("convert", bf16, tmp_path / "out", "--to", "int4", "--group-size", 64, "--scales", "mse", "--json")
    assert run.returncode == 0, run.stderr
    gain = json.loads(run.stdout)["sqnr_db"]["int4 group 64"]
    assert gain["mse"] > gain["amax"] + 0.1
    verify(bf16, tmp_path / "out")
    run = kconvert("convert", bf16, tmp_path / "mx", "--to", "mxfp4", "--scales", "mse")
    assert "mxfp4: SQNR" in run.stdout
    verify(bf16, tmp_path / "mx")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"to": "int8", "scales": "mse"}, "scales by mse are not for --to int8"),
        ({"to": "int4", "scales": "mse", "require_exact": True}, "exact values have their own scales"),
        ({"to": "int4", "scales": "best"}, "no scales by 'best'"),
        ({"to": "int4", "convention": "mine"}, "no convention 'mine'"),
        ({"to": "int4", "group_size": 20}, "a group size of 20 is not possible"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(KconvertError, match=fault):
        Recipe(**options)


def test_a_plan_has_the_same_hash_whatever_was_planned_before(bf16):
    import subprocess
    import sys

    script = """
import sys, kconvert
for convention in sys.argv[2:]:
    found = kconvert.plan(sys.argv[1], kconvert.Recipe("int4", convention=convention)).hash
print(found)
"""
    alone, after = (
        subprocess.run(
            [sys.executable, "-c", script, str(bf16), *names], capture_output=True, text=True, check=True
        ).stdout
        for names in (["compressed-tensors"], ["kimi", "compressed-tensors"])
    )
    assert alone == after
