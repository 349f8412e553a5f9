"""What a GGUF says of the model and its tokenizer is held to config.json and the files beside the source's weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from kimi_release import as_released

from kconvert import Recipe, convert, plan, verify
from kconvert.targets.sample import SampleRecipe, plan_synthetic

SMALL = {"layers": 2, "experts": 4, "hidden": 128, "moe_intermediate": 64, "vocab": 320}
LATENT = {"dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32, "heads": 2}
SIZES = {"qwen3-moe": {"heads": 4, "kv_heads": 2, "head": 32}, "kimi-k2-thinking": LATENT, "deepseek-v3": LATENT}
SIZES["gpt-oss"] = SIZES["qwen3-moe"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models and their GGUF files, `name` and `name.gguf`; look, do not touch."""
    root = tmp_path_factory.mktemp("models")
    for name, sizes in SIZES.items():
        convert(plan_synthetic(SampleRecipe(name, {**SMALL, **sizes})), root / name)
        as_released(root / name)
        edit(root / name, "tokenizer_config.json", eos_token="th", bos_token={"content": "a"})
        (root / name / "chat_template.jinja").write_text("{% for m in messages %}")
        convert(plan(root / name, Recipe("gguf")), root / "made")
        (root / "made" / f"{name}.gguf").rename(root / f"{name}.gguf")
        shutil.rmtree(root / "made")
    return root


def edit(root: Path, file: str, **changes: object) -> None:
    path = root / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


@pytest.mark.parametrize("name", SIZES)
def test_what_was_converted_says_what_its_source_says(models: Path, name: str) -> None:
    report = verify(models / name, models / f"{name}.gguf", keep_going=True)
    assert report.faults == ()
    assert not any("tokenizer" in note or "it has no" in note for note in report.notes)


NUMBERS = {
    "qwen3-moe": (
        "block_count",
        "expert_count",
        "expert_used_count",
        "attention.head_count",
        "attention.head_count_kv",
    ),
    "kimi-k2-thinking": (
        "attention.kv_lora_rank",
        "attention.key_length",
        "leading_dense_block_count",
        "expert_gating_func",
        "rope.scaling.original_context_length",
    ),
    "gpt-oss": ("attention.sliding_window", "embedding_length", "context_length"),
}
WHICH = {"qwen3-moe": "qwen3moe", "kimi-k2-thinking": "deepseek2", "gpt-oss": "gpt-oss"}
KEYS = [(name, f"{WHICH[name]}.{key}") for name, keys in NUMBERS.items() for key in keys]


@pytest.mark.parametrize(
    ("name", "key"), [*KEYS, ("qwen3-moe", "tokenizer.ggml.eos_token_id"), ("qwen3-moe", "tokenizer.ggml.bos_token_id")]
)
def test_a_number_that_is_not_the_sources_is_named(
    models: Path, tmp_path: Path, run_verify: Callable[..., Result], name: str, key: str
) -> None:
    data = bytearray((models / f"{name}.gguf").read_bytes())
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
    (value,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, value + 1)
    (tmp_path / "odd.gguf").write_bytes(data)
    result = run_verify(models / name, tmp_path / "odd.gguf")
    assert result.exit_code == 1
    assert f"odd.gguf: the key {key!r} is {value + 1}, by the source it is {value}" in result.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        (
            "kimi-k2-thinking",
            b"\x07\0\0\0\0\0\0\0kimi-k2",
            b"\x07\0\0\0\0\0\0\0minerva",
            "'tokenizer.ggml.pre' is 'minerva'",
        ),
        (
            "kimi-k2-thinking",
            b"\x04\0\0\0\0\0\0\0yarn",
            b"\x04\0\0\0\0\0\0\0none",
            "'deepseek2.rope.scaling.type' is 'none'",
        ),
        (
            "qwen3-moe",
            b"\x03\0\0\0\0\0\0\0t h",
            b"\x03\0\0\0\0\0\0\0h t",
            "'tokenizer.ggml.merges' has 'h t' as number 0",
        ),
        (
            "qwen3-moe",
            b"\x02\0\0\0\0\0\0\0th",
            b"\x02\0\0\0\0\0\0\0ht",
            "'tokenizer.ggml.tokens' has 'ht' as number 256",
        ),
        ("qwen3-moe", b"{% for", b"{% fur", "'tokenizer.chat_template' is '{% fur"),
        ("qwen3-moe", b"qwen3moe.block_count", b"qwen3moe.block_c0unt", "'qwen3moe.block_count' is missing"),
        ("qwen3-moe", b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "'tokenizer.ggml.merges' is missing"),
    ],
)
def test_a_word_that_is_not_the_sources_is_named(
    models: Path,
    tmp_path: Path,
    run_verify: Callable[..., Result],
    name: str,
    old: bytes,
    new: bytes,
    sentence: str,
) -> None:
    data = (models / f"{name}.gguf").read_bytes()
    assert old in data
    (tmp_path / "odd.gguf").write_bytes(data.replace(old, new, 1))
    result = run_verify(models / name, tmp_path / "odd.gguf")
    assert result.exit_code == 1
    assert f"odd.gguf: the key {sentence}" in result.stderr


def test_every_difference_is_in_the_report(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "qwen3-moe", tmp_path / "other")
    edit(tmp_path / "other", "config.json", rope_theta=5, num_experts_per_tok=1, max_position_embeddings=7)
    faults = verify(tmp_path / "other", models / "qwen3-moe.gguf", keep_going=True).faults
    named = ("context_length", "expert_used_count", "rope.freq_base")
    assert [name for name in named if any(f"'qwen3moe.{name}' is " in fault for fault in faults)] == list(named)


@pytest.mark.parametrize(
    "content", ["[", "[1]", "5", '{"model": 5}', '{"model": {"vocab": 5, "merges": 5}}', '{"added_tokens": [5]}', "{}"]
)
def test_a_source_without_a_sound_tokenizer_is_said_to_have_none(models: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(models / "qwen3-moe", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(content)
    report = verify(tmp_path / "other", models / "qwen3-moe.gguf", keep_going=True)
    assert report.faults == ()
    assert "its tokenizer is not compared, as the source has none that could be read" in report.notes


def test_what_a_file_may_lack_is_a_note(models: Path, tmp_path: Path) -> None:
    data = (models / "qwen3-moe.gguf").read_bytes()
    (tmp_path / "odd.gguf").write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templ4te", 1))
    report = verify(models / "qwen3-moe", tmp_path / "odd.gguf", keep_going=True)
    assert report.faults == ()
    assert "it has no tokenizer.chat_template, which the source has" in report.notes
