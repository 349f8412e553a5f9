"""The small files and headers of an output: bytes, or what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import TypeAlias


class Made:
    """Bytes that are made again, piece by piece, when they are asked for: those of a large model's output would be 130 MB."""

    __slots__ = ("_length", "_pieces", "digest")

    def __init__(self, pieces: Callable[[], Iterable[bytes]]) -> None:
        self._pieces, self._length = pieces, 0
        hash = sha256()
        for piece in pieces():
            self._length += len(piece)
            hash.update(piece)
        self.digest = hash.digest()

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return b"".join(self._pieces())


Text: TypeAlias = "bytes | Made"


def digest_of(text: Text) -> bytes:
    """Its SHA-256."""
    return text.digest if isinstance(text, Made) else sha256(text).digest()
