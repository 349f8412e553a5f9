"""A tokenizer for made-up models: the bytes and one merge, in the files that the model's own has."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from functools import cache

MERGED = b"th"


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


def _tiktoken(size: int) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(_tokens(size)))


def _tokenizer(size: int) -> bytes:
    tokens = _tokens(size)
    merges = [" ".join(spelt(bytes([byte])) for byte in token) for token in tokens if len(token) > 1]
    model = {"type": "BPE", "vocab": {spelt(token): rank for rank, token in enumerate(tokens)}, "merges": merges}
    parts = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "decoder": {"type": "ByteLevel"}}
    return json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model}).encode()


# File -> its content, for a vocabulary of so many tokens.
TOKENIZERS: Mapping[str, Callable[[int], bytes]] = {"tiktoken.model": _tiktoken, "tokenizer.json": _tokenizer}
