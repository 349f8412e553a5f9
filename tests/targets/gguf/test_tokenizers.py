"""The tokenizer of a GGUF cuts and merges as the checkpoint's own does; one that llama.cpp has not is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kconvert import KconvertError, Recipe, plan
from kconvert.checkpoint.gguf import read_gguf

Source = Callable[[str], Path]
ToGguf = Callable[..., Any]

# As the releases of Qwen 3, Llama 3, DeepSeek-V3, gpt-oss and (in the tokenizer.json of others) Kimi spell them.
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
LLAMA = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + END
)
KIMI = (
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
)


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def byte_level(use_regex: bool = False, prefix: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.fixture
def copy(source: Source, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(source(name), tmp_path / name, ignore=shutil.ignore_patterns(".kconvert")))


def edit(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**table, **changes}))


def planned(root: Path, key: str) -> Any:
    """A value of the metadata that a GGUF of the model would have."""
    shard = plan(root, Recipe("gguf")).shards[0]
    header = shard.header
    return read_gguf("planned", shard.nbytes, lambda start, size: header[start : start + size], "planned").metadata[key]


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize(
    ("steps", "pre"),
    [
        (sequence(split(QWEN), byte_level()), "qwen2"),
        (sequence(split(LLAMA), byte_level()), "smaug-bpe"),
        (sequence(split(LLAMA, "Removed", True), byte_level()), "smaug-bpe"),
        (sequence(*map(split, DEEPSEEK), byte_level()), "deepseek-v3"),
        (sequence(split(CASED), byte_level()), "gpt-4o"),
        (sequence(split(CASED, "Removed", True), byte_level()), "gpt-4o"),
        (sequence(split(KIMI), byte_level()), "kimi-k2"),
        (sequence({"type": "Digits", "individual_digits": True}, byte_level(True)), "smollm"),
        (byte_level(True), "gpt-2"),
    ],
)
def test_the_tokenizer_says_how_texts_are_cut_whatever_the_model(
    copy: Callable[[str], Path], name: str, steps: dict[str, Any], pre: str
) -> None:
    root = copy(name)
    edit(root / "tokenizer.json", pre_tokenizer=steps)
    assert planned(root, "tokenizer.ggml.pre") == pre


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pre_tokenizer": None}, "cuts texts into words by null, as none of those does that are known here"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "known here .*qwen2.*, so llama.cpp would make other tokens"),
        ({"pre_tokenizer": byte_level(True, prefix=True)}, "cuts texts into words by"),
        ({"pre_tokenizer": byte_level(False)}, "cuts texts into words by"),
        ({"pre_tokenizer": sequence(split(r"\p{L}+"), byte_level())}, "cuts texts into words by"),
        ({"pre_tokenizer": sequence(split(QWEN))}, "cuts texts into words by"),
        ({"pre_tokenizer": sequence(*(split(one, "Removed", True) for one in DEEPSEEK), byte_level())}, "cuts texts"),
        ({"pre_tokenizer": sequence(split(QWEN, "MergedWithNext"), byte_level())}, "cuts texts into words by"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "cuts texts into words by"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": ["a"]}}}, "cuts texts into words by"),
        (
            {"pre_tokenizer": {"type": "Split", "behavior": ["a"], "pattern": {"Regex": "a"}}},
            "cuts texts into words by",
        ),
        ({"pre_tokenizer": 5}, "cuts texts into words by 5"),
        ({"normalizer": {"type": "Lowercase"}}, r"changes texts first \(Lowercase\), which llama.cpp does not do"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}}, "first .Strip."),
    ],
)
def test_a_tokenizer_whose_way_llama_cpp_has_not_is_refused(
    copy: Callable[[str], Path], changes: dict[str, Any], sentence: str
) -> None:
    root = copy("qwen3-moe")
    edit(root / "tokenizer.json", **changes)
    with pytest.raises(KconvertError, match=sentence):
        plan(root, Recipe("gguf"))


def test_words_that_are_tokens_are_left_whole_as_llama_3_has_it(copy: Callable[[str], Path]) -> None:
    root = copy("qwen3-moe")
    table = json.loads((root / "tokenizer.json").read_text())
    begin = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    edit(
        root / "tokenizer.json",
        model={**table["model"], "ignore_merges": True},
        normalizer={"type": "NFC"},
        pre_tokenizer=sequence(split(LLAMA), byte_level()),
        post_processor={"type": "Sequence", "processors": [byte_level(), begin]},
    )
    assert planned(root, "tokenizer.ggml.pre") == "llama-bpe"
    assert planned(root, "tokenizer.ggml.add_bos_token") is True
    edit(root / "tokenizer.json", post_processor=None)
    assert planned(root, "tokenizer.ggml.add_bos_token") is False


def test_a_tiktoken_file_counts_where_the_models_own_tokenizer_reads_it(
    copy: Callable[[str], Path], source: Source
) -> None:
    root = copy("qwen3-moe")
    shutil.copy(source("kimi-k2-thinking") / "tiktoken.model", root)
    assert planned(root, "tokenizer.ggml.pre") == "gpt-2"
    edit(root / "tokenizer_config.json", tokenizer_class="TikTokenTokenizer")
    assert planned(root, "tokenizer.ggml.pre") == "kimi-k2"
    kimi = copy("kimi-k2-thinking")
    shutil.copy(source("deepseek-v3") / "tokenizer.json", kimi)
    edit(kimi / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert planned(kimi, "tokenizer.ggml.pre") == "gpt-2"
    (kimi / "tokenizer.json").unlink()
    with pytest.raises(KconvertError, match=r"has no tokenizer\.json, and a GGUF needs"):
        plan(kimi, Recipe("gguf"))


def test_a_token_under_two_ids_is_refused(copy: Callable[[str], Path]) -> None:
    root = copy("kimi-k2-thinking")
    edit(root / "tokenizer_config.json", added_tokens_decoder={"258": {"content": "[X]"}, "259": {"content": "[X]"}})
    with pytest.raises(KconvertError, match=r"has the token '\[X\]' under two ids"):
        plan(root, Recipe("gguf"))


def test_a_chat_template_that_no_reader_takes_is_refused(copy: Callable[[str], Path]) -> None:
    root = copy("qwen3-moe")
    (root / "chat_template.jinja").write_bytes(b" " * ((1 << 24) + 1))
    with pytest.raises(
        KconvertError, match=r"chat_template\.jinja has a chat template over the limit of 16,777,216 bytes"
    ):
        plan(root, Recipe("gguf"))
    with open(root / "chat_template.jinja", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(KconvertError, match=r"chat_template\.jinja has 1,099,511,627,776 bytes, over the limit"):
        plan(root, Recipe("gguf"))
