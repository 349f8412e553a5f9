"""A tokenizer for made-up models, in the files that engines read: bytes, one merge, special tokens and a chat template."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

MERGED = b"th"
# Behind the bytes and the merge, in this order: Kimi-K2-Thinking's special tokens, which the parsers of engines look for.
BEGIN, END, PAD, TURN_END = "[BOS]", "[EOS]", "[PAD]", "<|im_end|>"
SPECIAL = (
    BEGIN,
    END,
    PAD,
    TURN_END,
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<think>",
    "</think>",
)
# A conversation with tools, calls, results and reasoning in those tokens.
TEMPLATE = """\
{%- macro words(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part.text or '' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|im_system|>tools<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for message in messages -%}
{%- set role = message.role -%}
<|im_{{ role if role in ('user', 'assistant') else 'system' }}|>{{ role }}<|im_middle|>
{%- if role == 'tool' -%}{{ message.tool_call_id }}: {% endif -%}
{%- if role == 'assistant' -%}
<think>{{ message.reasoning_content or message.reasoning or '' }}</think>
{%- endif -%}
{{ words(message.content) }}
{%- if message.tool_calls -%}
<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
{%- set given = call.function.arguments -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ given if given is string else given | tojson }}<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
GENERATION = "generation_config.json"
IDS = {
    "bos_token_id": BEGIN,
    "eos_token_id": TURN_END,
    "pad_token_id": PAD,
}  # in config.json and generation_config.json


@cache
def byte_spelling() -> Mapping[int, str]:
    """GPT-2's character for each byte: itself where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def spelt(token: bytes) -> str:
    """The token's bytes as GPT-2 spells them."""
    return "".join(map(byte_spelling().__getitem__, token))


def _tokens(size: int) -> list[bytes]:
    return [*(bytes([byte]) for byte in range(256)), MERGED][:size]


def special_tokens(size: int) -> dict[str, int]:
    """Special token -> its id in a vocabulary of `size` tokens; none where it has no room for all."""
    first = len(_tokens(size))
    return {token: first + place for place, token in enumerate(SPECIAL)} if first + len(SPECIAL) <= size else {}


def with_ids(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """config.json or generation_config.json with the ids of these special tokens where it has others, in its sections too."""
    special = special_tokens(size)
    known = {key: special[token] for key, token in IDS.items()} if special else {}
    return {
        key: with_ids(value, size) if isinstance(value, dict) else known.get(key, value)
        for key, value in config.items()
    }


def tokenizer_files(size: int, published: Mapping[str, str]) -> dict[str, bytes]:
    """The side files of a made-up model of `size` tokens, by name: the `published` ones, and a tokenizer.

    Engines read tokenizer.json without the model's own code; that code reads tiktoken.model, where the model has one.
    """
    files = {name: text.encode() for name, text in published.items()}
    made = {"tokenizer.json": _tokenizer, "tokenizer_config.json": _settings}
    if "tiktoken.model" in published:
        made["tiktoken.model"] = _tiktoken
    files |= {name: make(size) for name, make in made.items()}
    if special_tokens(size):
        files["chat_template.jinja"] = TEMPLATE.encode()
    if GENERATION in files:
        files[GENERATION] = json.dumps(with_ids(json.loads(files[GENERATION]), size)).encode() + b"\n"
    return files


def _tiktoken(size: int) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(_tokens(size)))


def _tokenizer(size: int) -> bytes:
    tokens = _tokens(size)
    merges = [" ".join(spelt(bytes([byte])) for byte in token) for token in tokens if len(token) > 1]
    model = {"type": "BPE", "vocab": {spelt(token): rank for rank, token in enumerate(tokens)}, "merges": merges}
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [{"id": number, **_added(token)} for token, number in special_tokens(size).items()]
    parts = {"pre_tokenizer": pieces, "decoder": pieces}
    return json.dumps({"version": "1.0", "added_tokens": added, **parts, "model": model}).encode()


def _settings(size: int) -> bytes:
    special = special_tokens(size)
    ends = {"bos_token": BEGIN, "eos_token": TURN_END, "pad_token": PAD} if special else {}
    added = {str(number): _added(token) for token, number in special.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **ends}
    return json.dumps({**settings, "added_tokens_decoder": added}).encode()


def _added(token: str) -> dict[str, object]:
    return {
        "content": token,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        "special": True,
    }
