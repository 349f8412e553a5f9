"""How a tokenizer cuts text into words before it merges their bytes, and what llama.cpp calls that way.

tokenizer.json spells it by regular expressions, one after the other; a GGUF has a name, for which llama.cpp has expressions of
its own. Source: https://github.com/ggml-org/llama.cpp, `src/llama-vocab.cpp`, `llm_tokenizer_bpe` and `pre_type`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

KIMI = "kimi-k2"  # the only one that reads a vocabulary in tiktoken.model

_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_NOT_HAN = r"&&[^\p{Han}]"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(short: str, but: str = "") -> str:
    """Words whose capitals come first, in letters but these."""
    first, rest = (rf"[{kind}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]" for kind in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
    return rf"[^\r\n\p{{L}}\p{{N}}]?{first}*{rest}+{short}|[^\r\n\p{{L}}\p{{N}}]?{first}+{rest}*{short}"


BYTES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of a ByteLevel itself
DIGITS = r"\p{N}"
# Expressions -> name.
NAMES: Mapping[tuple[str, ...], str] = {
    (BYTES,): "gpt-2",
    (DIGITS, BYTES): "smollm",
    (rf"{_SHORT}|{_WORDS}|\p{{N}}|{_MARKS}",): "qwen2",
    (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ): "qwen35",
    (rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}",): "smaug-bpe",
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ): "deepseek-v3",
    (rf"{_cased(_SHORT + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",): "gpt-4o",
    (rf"{_cased('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",): "tekken",
    (rf"[\p{{Han}}]+|{_cased(_SHORT + '?', _NOT_HAN)}|\p{{N}}{{1,3}}|{_MARKS}",): KIMI,
}
# Name -> the one for the same expressions where a word that is a token is not merged.
WHOLE_WORDS = {"smaug-bpe": "llama-bpe"}
# What a Split does with the words that it finds: it keeps them apart; the second does not keep what is between them, where
# an expression that stands alone leaves nothing.
KEPT = (("Isolated", False), ("Removed", True))


def name_of(table: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre_tokenizer of a tokenizer.json; None where none of those known is the same."""
    steps = list(steps_of(table.get("pre_tokenizer"), "pretokenizers"))
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if "ByteLevel" not in kinds or kinds.index("ByteLevel") < len(kinds) - 1:  # the last one spells the bytes
        return None
    found = tuple(part for step in steps for part in _expressions(step, alone=len(steps) <= 2))
    model = table.get("model")
    whole = isinstance(model, dict) and model.get("ignore_merges") is True
    name = NAMES.get(found)  # type: ignore[arg-type]  # which may hold None
    return WHOLE_WORDS.get(name, name) if whole and name else name


def changes_text(table: Mapping[str, Any]) -> str | None:
    """The normalizer that changes text before it is cut; None where there is none but Unicode's NFC, which llama.cpp's own
    converter leaves out too."""
    kinds = (
        step.get("type") if isinstance(step, dict) else step
        for step in steps_of(table.get("normalizer"), "normalizers")
    )
    return next((str(kind) for kind in kinds if kind != "NFC"), None)


def steps_of(step: object, parts: str) -> Iterator[object]:
    """A step of a tokenizer, or those of a sequence of such."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        inner = step.get(parts)
        yield from inner if isinstance(inner, list) else [inner]
    elif step is not None:
        yield step


def _expressions(step: object, alone: bool) -> Iterator[str | None]:
    """The expressions of one step, `alone` before the bytes are spelt; None for what is none that llama.cpp has."""
    table = step if isinstance(step, dict) else {}
    kind, pattern = table.get("type"), table.get("pattern")
    if kind == "ByteLevel" and table.get("add_prefix_space") is False:
        if table.get("use_regex", True):
            yield BYTES
    elif kind == "Digits" and table.get("individual_digits") is True:
        yield DIGITS
    elif kind == "Split" and (table.get("behavior"), bool(table.get("invert"))) in KEPT[: 1 + alone]:
        text = pattern.get("Regex") if isinstance(pattern, dict) else None
        yield text.replace("\r", r"\r").replace("\n", r"\n") if isinstance(text, str) else None
    else:
        yield None
