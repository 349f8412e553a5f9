"""What `verify` has certified, `check` finds again: every bit of it, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kconvert
from kconvert.cli import main
from kconvert.proof import digests, processes
from kconvert.targets.sample import SampleRecipe, plan_synthetic


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def one_sentence(result: Result, code: int) -> str:
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, line.partition(":")[0]) == (code, {1: "failed", 2: "error"}[code]), line
    return line


def save(checkpoint: Any) -> None:
    """With config.json as it was, letter by letter."""
    text = (checkpoint.root / "config.json").read_bytes()
    checkpoint.save()
    (checkpoint.root / "config.json").write_bytes(text)


@pytest.fixture(scope="session")
def certified(int4: Path, bf16: Path) -> Path:
    """The certificate of `bf16`."""
    path = bf16.parent / "bf16.certificate.json"
    kconvert.certify(kconvert.verify(int4, bf16), path)
    return path


def test_verify_certifies_and_check_needs_no_source(int4: Path, bf16_copy: Path, tmp_path: Path, raw: Any) -> None:
    path = tmp_path / "out.json"
    said = run("verify", int4, bf16_copy, "--certificate", path)
    assert said.exit_code == 0
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said.stdout

    found = run("check", bf16_copy, path)
    tensors = raw.load(bf16_copy)
    assert found.exit_code == 0
    assert f"{len(list(tensors))} tensors and" in found.stdout
    assert "verified against int4 (exact); they were held to the source's values" in found.stdout


@pytest.mark.parametrize("share", [1 << 30, 1000])  # here, or in processes
def test_what_is_compared_is_not_read_again_to_certify_it(
    int4: Path, bf16: Path, certified: Path, tmp_path: Path, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SHARE", share)
    report = kconvert.verify(int4, bf16, digest=True, thorough=False)
    wanted = json.loads(certified.read_text())["tensors"]
    assert report.digests == {name: entry["sha256"] for name, entry in wanted.items()}
    read: list[int] = []
    kconvert.certify(report, tmp_path / "out.json", read.append)
    assert (read, json.loads((tmp_path / "out.json").read_text())["tensors"]) == ([], wanted)


def test_stacks_are_read_again_to_certify_them(int4: Path, tmp_path: Path) -> None:
    kconvert.convert(kconvert.plan(int4, kconvert.Recipe("mlx")), tmp_path / "mlx")
    report = kconvert.verify(int4, tmp_path / "mlx", digest=True)
    assert report.digests.keys() < report.output.checkpoint.tensors.keys()
    kconvert.certify(report, tmp_path / "out.json")
    kconvert.certify(kconvert.verify(int4, tmp_path / "mlx"), tmp_path / "again.json")
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_a_certificate_says_what_each_tensor_is_and_what_it_was_held_to(
    int4: Path, bf16: Path, certified: Path, raw: Any
) -> None:
    document = json.loads(certified.read_text())
    checkpoint = raw.load(bf16)
    assert document["tensors"] == {
        name: {
            "dtype": checkpoint[name].dtype,
            "shape": checkpoint[name].shape,
            "sha256": hashlib.sha256(checkpoint[name].data).hexdigest(),
        }
        for name in checkpoint
    }
    assert document["files"]["config.json"] == hashlib.sha256((bf16 / "config.json").read_bytes()).hexdigest()
    assert {"chat_template.jinja", "docs/deploy_guidance.md"} <= document["files"].keys()
    assert document["kconvert"] == kconvert.__version__
    assert document["standard"] == "exact"
    assert document["weights"]["model.layers.1.mlp.experts.2.gate_proj"] == "exact values"
    assert document["weights"]["model.norm.weight"] == "exact bytes"
    assert document["not_compared"] == []
    source = document["source"]
    assert source["name"] == "int4"
    assert source["files"]["config.json"] == hashlib.sha256((int4 / "config.json").read_bytes()).hexdigest()
    shard = next(int4.glob("*.safetensors"))
    content = shard.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    assert source["headers"][shard.name] == hashlib.sha256(header).hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.2.gate_proj.weight",
        "model.norm.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_one_flipped_bit_is_found(bf16_copy: Path, certified: Path, raw: Any, name: str, position: int) -> None:
    checkpoint = raw.load(bf16_copy)
    data = bytearray(checkpoint[name].data)
    data[position] ^= 1
    checkpoint[name].data = bytes(data)
    save(checkpoint)

    line = one_sentence(run("check", bf16_copy, certified), 1)
    assert repr(name) in line
    assert "sha256 differs" in line


@pytest.mark.parametrize("kind", ["weight_packed", "weight_scale", "weight_shape"])
def test_one_flipped_bit_of_codes_scales_and_shapes_is_found(
    int4: Path, int4_copy: Path, tmp_path: Path, raw: Any, kind: str
) -> None:
    kconvert.certify(kconvert.verify(int4, int4_copy), tmp_path / "out.json")
    name = f"model.layers.2.mlp.experts.3.up_proj.{kind}"
    checkpoint = raw.load(int4_copy)
    checkpoint[name].data = bytes([checkpoint[name].data[0] ^ 0x10]) + checkpoint[name].data[1:]
    save(checkpoint)

    assert repr(name) in one_sentence(run("check", int4_copy, tmp_path / "out.json"), 1)


def test_two_swapped_tensors_are_found(bf16_copy: Path, certified: Path, raw: Any) -> None:
    checkpoint = raw.load(bf16_copy)
    one, two = (checkpoint[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"] for expert in (0, 1))
    one.data, two.data = two.data, one.data
    save(checkpoint)

    assert "model.layers.1.mlp.experts.0.up_proj.weight" in one_sentence(run("check", bf16_copy, certified), 1)


def drop(checkpoint: Any) -> str:
    checkpoint.pop("model.norm.weight")
    return "lacks the tensor 'model.norm.weight'"


def add(checkpoint: Any) -> str:
    checkpoint.put("mystery", checkpoint["model.norm.weight"])
    return "has the tensor 'mystery', which is not in the certificate"


def recast(checkpoint: Any) -> str:
    checkpoint["model.norm.weight"].dtype = "F16"
    return "'model.norm.weight' is F16 [256], in the certificate BF16 [256]"


@pytest.mark.parametrize("damage", [drop, add, recast])
def test_what_is_missing_extra_or_of_another_dtype_is_named(
    bf16_copy: Path, certified: Path, raw: Any, damage: Callable[[Any], str]
) -> None:
    checkpoint = raw.load(bf16_copy)
    words = damage(checkpoint)
    save(checkpoint)

    assert words in one_sentence(run("check", bf16_copy, certified), 1)


def test_a_truncated_file_is_found(bf16_copy: Path, certified: Path) -> None:
    shard = sorted(bf16_copy.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 1)

    line = one_sentence(run("check", bf16_copy, certified), 1)
    assert shard.name in line
    assert "truncated" in line


def test_a_changed_config_is_found(bf16_copy: Path, certified: Path) -> None:
    path = bf16_copy / "config.json"
    path.write_text(path.read_text().replace("4", "5", 1))

    assert f"{path} is not the file of the certificate" in one_sentence(run("check", bf16_copy, certified), 1)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tiktoken.model", "config.json"])
def test_a_missing_file_is_found(bf16_copy: Path, certified: Path, name: str) -> None:
    (bf16_copy / name).unlink()

    assert f"lacks the file {name!r}" in one_sentence(run("check", bf16_copy, certified), 1)


@pytest.mark.parametrize("name", ["modeling_other.py", "hf_quant_config.json"])
def test_a_file_that_engines_read_and_nobody_certified_is_found(bf16_copy: Path, certified: Path, name: str) -> None:
    (bf16_copy / name).write_text("{}")

    assert f"has the file {name!r}" in one_sentence(run("check", bf16_copy, certified), 1)


def test_a_certificate_may_lie_beside_what_it_certifies(int4: Path, bf16_copy: Path) -> None:
    for _ in range(2):  # the second time over the first
        assert run("verify", int4, bf16_copy, "--certificate", bf16_copy / "certificate.json").exit_code == 0
        assert run("check", bf16_copy, bf16_copy / "certificate.json").exit_code == 0


def test_another_spread_over_files_is_the_same_checkpoint(bf16_copy: Path, certified: Path, raw: Any) -> None:
    checkpoint = raw.load(bf16_copy)
    checkpoint.move("model.norm.weight", next(reversed(checkpoint.files)))
    save(checkpoint)

    assert run("check", bf16_copy, certified).exit_code == 0


def test_a_failed_check_certifies_nothing(int4: Path, bf16_copy: Path, tmp_path: Path, raw: Any) -> None:
    checkpoint = raw.load(bf16_copy)
    checkpoint["model.norm.weight"].data = bytes(len(checkpoint["model.norm.weight"].data))
    save(checkpoint)

    for report in ([], ["--report", tmp_path / "report.json"]):
        one_sentence(run("verify", int4, bf16_copy, "--certificate", tmp_path / "out.json", *report), 1)
        assert not (tmp_path / "out.json").exists()


def test_a_sample_certifies_nothing(int4: Path, bf16: Path, tmp_path: Path) -> None:
    result = run("verify", int4, bf16, "--sample", 0.5, "--certificate", tmp_path / "out.json")
    assert result.exit_code == 2
    assert "leave out --sample" in result.stderr
    with pytest.raises(kconvert.KconvertError, match="were not compared"):
        kconvert.certify(kconvert.verify(int4, bf16, sample=0.1), tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_an_output_that_changes_behind_the_check_is_not_certified(int4: Path, bf16_copy: Path, tmp_path: Path) -> None:
    report = kconvert.verify(int4, bf16_copy)
    shard = next(bf16_copy.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    with pytest.raises(kconvert.CheckFailed, match="has changed while it was verified"):
        kconvert.certify(report, tmp_path / "out.json")


def test_what_is_within_limits_is_certified_as_that(int4: Path, fp8: Path, tmp_path: Path) -> None:
    for options, outcome in (([], "exact bytes"), (["--close"], "within limits")):
        path = tmp_path / f"{outcome}.json"
        assert run("verify", int4, fp8, "--certificate", path, *options).exit_code == 0
        document = json.loads(path.read_text())
        assert document["weights"]["model.layers.1.mlp.experts.2.gate_proj"] == outcome
    assert "(within limits)" in run("check", fp8, path).stdout


def test_check_says_what_was_proven_within_limits_only(int4: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    kconvert.convert(kconvert.plan(int4, kconvert.Recipe("gguf", rest="q8_0")), tmp_path / "gguf")
    assert run("verify", int4, tmp_path / "gguf", "--certificate", path).exit_code == 0
    said = run("check", tmp_path / "gguf", path).stdout
    assert re.search(r"against int4 \(exact, but for \d+ weights within limits\)", said)
    assert json.loads(run("check", tmp_path / "gguf", path, "--json").stdout)["outcomes"]["exact values"] > 24


def test_scales_of_activations_that_verify_holds_to_1_are_compared(int4: Path, tmp_path: Path, raw: Any) -> None:
    kconvert.convert(kconvert.plan(int4, kconvert.Recipe("nvfp4", layout="modelopt")), tmp_path / "out")
    kconvert.certify(kconvert.verify(int4, tmp_path / "out"), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["not_compared"] == []
    checkpoint = raw.load(tmp_path / "out")
    name = next(name for name in checkpoint if name.endswith("input_scale"))
    checkpoint[name].data = checkpoint[name].data[::-1]
    save(checkpoint)
    with pytest.raises(kconvert.CheckFailed, match=f"'{name}' is not 1"):
        kconvert.verify(int4, tmp_path / "out")


def test_check_says_by_which_reference_rounded_weights_were_judged(int4: Path, fp8: Path, tmp_path: Path) -> None:
    assert run("verify", int4, fp8, "--certificate", tmp_path / "out.json").exit_code == 0
    assert "held to the reference encoding" in run("check", fp8, tmp_path / "out.json").stdout


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_no_other_file_is_replaced_by_a_certificate(int4: Path, bf16_copy: Path, name: str) -> None:
    path = bf16_copy / name
    path.write_text(text := path.read_text() if path.exists() else "mine")

    line = one_sentence(run("verify", int4, bf16_copy, "--certificate", path), 2)
    assert f"{path} is there and is no certificate" in line
    assert path.read_text() == text


def test_amx_weights_are_certified_too(int4: Path, tmp_path: Path) -> None:
    packed, path = tmp_path / "amx", tmp_path / "out.json"
    assert run("repack-amx", int4, packed, "--method", "AMXINT8", "--numa", 1, "-q").exit_code == 0
    assert run("verify", int4, packed, "--certificate", path).exit_code == 0
    assert run("check", packed, path).exit_code == 0
    shard = next(packed.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "sha256 differs" in one_sentence(run("check", packed, path), 1)


@pytest.mark.parametrize("like", ["gpt-oss", "qwen3.5-moe"])
def test_stacks_of_experts_are_compared_matrix_by_matrix_and_certified_as_they_lie(tmp_path: Path, like: str) -> None:
    sizes = {"layers": 1, "experts": 2, "hidden": 128, "vocab": 64}
    kconvert.convert(plan_synthetic(SampleRecipe(like, sizes)), tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "copy", ignore=shutil.ignore_patterns(".kconvert"))
    kconvert.certify(kconvert.verify(tmp_path / "source", tmp_path / "copy"), tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["not_compared"] == []
    assert any("experts" in name for name in document["tensors"])
    assert run("check", tmp_path / "copy", tmp_path / "out.json").exit_code == 0


def edit(text: str, **changes: Any) -> bytes:
    return json.dumps({**json.loads(text), **changes}).encode()


ENTRY = {"dtype": "BF16", "shape": [2], "sha256": "0" * 64}
HOSTILE: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "cut short": lambda text: text[: len(text) // 2].encode(),
    "deep": lambda text: b"[" * 100_000,
    "not unicode": lambda text: b"\xff\xfe",
    "a list": lambda text: b"[]",
    "another schema": lambda text: edit(text, schema="kconvert-certificate-2"),
    "twice the same name": lambda text: b'{"schema": "kconvert-certificate-1", "schema": "kconvert-certificate-1"}',
    "no tensors": lambda text: edit(text, tensors=None),
    "files as a list": lambda text: edit(text, files=[]),
    "not_compared as a number": lambda text: edit(text, not_compared=3),
    "no source": lambda text: edit(text, source="int4"),
    "a standard of its own": lambda text: edit(text, standard="beyond doubt"),
    "no outcomes": lambda text: edit(text, weights=None),
    "an outcome of its own": lambda text: edit(text, weights={"a": "beyond doubt"}),
    "an outcome that is a list": lambda text: edit(text, weights={"a": ["exact values"]}),
    "no reference": lambda text: edit(text, reference=None),
    "a version of many lines": lambda text: edit(text, kconvert="1\n2"),
    "a short sha256": lambda text: edit(text, tensors={"a": {**ENTRY, "sha256": "00"}}),
    "a sha256 that is a number": lambda text: edit(text, files={"config.json": 0}),
    "a negative shape": lambda text: edit(text, tensors={"a": {**ENTRY, "shape": [-1]}}),
    "a true shape": lambda text: edit(text, tensors={"a": {**ENTRY, "shape": [True]}}),
    "a long shape": lambda text: edit(text, tensors={"a": {**ENTRY, "shape": [1] * 1000}}),
    "a dtype that is a sentence": lambda text: edit(text, tensors={"a": {**ENTRY, "dtype": "trust me"}}),
    "a number of 5000 digits": lambda text: text.replace("[256]", f"[{'9' * 5000}]").encode(),
    "a tensor that is a text": lambda text: edit(text, tensors={"a": "BF16"}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_certificate_is_bad_input(bf16: Path, certified: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(HOSTILE[kind](certified.read_text()))

    line = one_sentence(run("check", bf16, path), 2)
    assert f"{path} is no certificate, or damaged" in line
    assert len(line) < 500 + len(str(path))


def test_a_certificate_of_another_checkpoint_fails(fp8: Path, certified: Path) -> None:
    assert "which is not in the certificate" in one_sentence(run("check", fp8, certified), 1)


@pytest.mark.parametrize("what", ["nothing.json", "."])
def test_a_certificate_that_is_not_there_is_bad_input(bf16: Path, tmp_path: Path, what: str) -> None:
    assert "is not a file" in one_sentence(run("check", bf16, tmp_path / what), 2)


def test_large_tensors_are_read_in_pieces(bf16: Path, certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "CHUNK", 1000)
    monkeypatch.setattr(digests, "AHEAD", 3)
    assert run("check", bf16, certified).exit_code == 0


def test_a_checkpoint_on_the_hub_that_is_not_there_is_bad_input(certified: Path, tmp_path: Path) -> None:
    assert "is not a directory" in one_sentence(run("check", tmp_path / "nothing", certified), 2)


def test_a_snapshot_of_the_cache_is_checked_through_its_links(bf16: Path, certified: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    shutil.copytree(bf16, snapshot, ignore=shutil.ignore_patterns(".kconvert"))
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))

    assert run("check", snapshot, certified).exit_code == 0
