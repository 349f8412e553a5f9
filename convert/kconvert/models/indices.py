"""The numbers that placeholders in names stand for: layers, layers of a kind, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kconvert.models.sizes import evaluate, lookup

# Kimi-K3 has 250,000. A config.json that describes more than this is damaged, and its names would fill the memory.
MAX_NAMES = 4_000_000


@dataclass(frozen=True, slots=True)
class Index:
    """The numbers that a placeholder stands for.

    They are a `range` of expressions, or the `list` at a key of config.json, which counts from `first`. With `equal` or
    `unequal` the list has a value for each layer, and the numbers are those of the range whose value is this one, or is not;
    one beyond the list's end has no value. None is among them that the index `without` has. In names they count from the
    expression `named_from`.
    """

    range: tuple[str, ...] = ()
    list: str | None = None
    first: int = 0
    equal: str | int | None = None
    unequal: str | int | None = None
    without: str | None = None
    named_from: str = "0"

    @property
    def by_value(self) -> bool:
        """Whether its list has an entry for each layer."""
        return self.equal is not None or self.unequal is not None


def numbers_of(
    index: Index, config: Mapping[str, Any], sizes: Mapping[str, int], known: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The numbers of `index` in this config.json; `known` has those of the indices before it.

    KeyError for a size that is missing, ValueError when there are no such numbers or too many.
    """
    if index.by_value or index.list is None:
        numbers: Sequence[int] = range(*(evaluate(bound, sizes) for bound in index.range))
    else:
        numbers = layers_in(lookup(config, index.list), index.list)
    if len(numbers) > MAX_NAMES:
        raise ValueError(f"more than {MAX_NAMES:,} of one kind")
    if index.by_value and index.list is not None:
        numbers = _by_value(index, numbers, lookup(config, index.list))
    left_out = frozenset(known[index.without]) if index.without else frozenset()
    return tuple(number - index.first for number in numbers if number - index.first not in left_out)


def layers_in(value: Any, key: str) -> list[int]:
    """A list of layers, which is also spelt as a text with commas; ValueError when `value` is none."""
    if isinstance(value, str):
        value = [int(word) if word.strip().isdecimal() else word for word in value.split(",") if value]
    if value is not None and (not isinstance(value, list) or not all(type(number) is int for number in value)):
        raise ValueError(f"{key} is not a list of layers")
    return value or []


def _by_value(index: Index, numbers: Sequence[int], values: Any) -> list[int]:
    if values is not None and not isinstance(values, list):
        raise ValueError(f"{index.list} is not a list of layers")
    given = dict(enumerate(values or ()))
    if index.equal is not None:
        return [number for number in numbers if given.get(number) == index.equal]
    return [number for number in numbers if given.get(number) != index.unequal]
