"""config.json as what writes a GGUF asks for it: by key, and of the kind that llama.cpp wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kconvert.errors import KconvertError

MOST, LARGEST = (1 << 32) - 1, 3e38  # of its integers, and of its F32


class Fields:
    """config.json, each of whose values is asked for by key, and is of the kind that is wanted."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self._table = table
        self._where = where

    def has(self, key: str) -> bool:
        return self._table.get(key) is not None

    def integer(self, key: str) -> int:
        value = self._table.get(key)
        if type(value) is not int or not 0 <= value <= MOST:
            raise self.fault(key, "a whole number")
        return value

    def number(self, key: str) -> float:
        value = self._table.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
            raise self.fault(key, "a number")
        return float(value)

    def true(self, key: str) -> bool:
        value = self._table.get(key)
        if not isinstance(value, bool | None):
            raise self.fault(key, "true or false")
        return bool(value)

    def value(self, key: str) -> Any:
        return self._table.get(key)

    def table(self, key: str) -> Fields:
        value = self._table.get(key)
        return Fields(value if isinstance(value, Mapping) else {}, f"{self._where}: {key}")

    def fault(self, key: str, wanted: str) -> KconvertError:
        have = f"is {self._table[key]!r:.80}" if self.has(key) else "is missing"
        return KconvertError(f"{self._where}: {key} {have}, but llama.cpp needs {wanted} there")
