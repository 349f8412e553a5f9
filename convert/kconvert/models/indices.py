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
    """The numbers that a placeholder stands for: a `range` of expressions, or the `list` at a key of config.json, which
    counts from `first`; but none of those that the index `without` has."""

    range: tuple[str, ...] = ()
    list: str | None = None
    first: int = 0
    without: str | None = None


def numbers_of(
    index: Index, config: Mapping[str, Any], sizes: Mapping[str, int], known: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The numbers of `index` in this config.json; `known` has those of the indices before it.

    KeyError for a size that is missing, ValueError when there are no such numbers or too many.
    """
    numbers: Sequence[int]
    if index.list is None:
        numbers = range(*(evaluate(bound, sizes) for bound in index.range))
    else:
        numbers = lookup(config, index.list) or []
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"{index.list} is not a list of layers")
    if len(numbers) > MAX_NAMES:
        raise ValueError(f"more than {MAX_NAMES:,} of one kind")
    left_out = frozenset(known[index.without]) if index.without else frozenset()
    return tuple(number - index.first for number in numbers if number - index.first not in left_out)
