"""The encodings: one module a family; a new one is its file and its line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kconvert.formats import dense, packed
from kconvert.formats.base import Family, Format, Part

if TYPE_CHECKING:
    from kconvert.checkpoint.config import Scheme

__all__ = ["FAMILIES", "QUANTISED_SUFFIXES", "Format", "Part", "from_scheme", "recognise"]

FAMILIES: tuple[Family, ...] = (dense, packed)
SUFFIXES = frozenset().union(*(family.SUFFIXES for family in FAMILIES))
QUANTISED_SUFFIXES = SUFFIXES - dense.SUFFIXES


def from_scheme(scheme: Scheme) -> Format:
    """The format in which a scheme of config.json spells a weight; ValueError when no family knows it."""
    for family in FAMILIES:
        format = family.from_scheme(scheme)
        if format is not None:
            return format
    raise ValueError(f"the scheme {scheme} is not supported")


def recognise(
    scheme: Scheme | None, found: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int] | None
) -> tuple[Format, tuple[int, int]]:
    """The format and shape of the weight that these tensors {suffix: (dtype, shape)} spell; see base.Family.

    Raises ValueError, saying what does not fit, when no family or not exactly this one claims them all.
    """
    for family in FAMILIES:
        if found.keys() <= family.SUFFIXES:
            return family.recognise(scheme, found, shape)
    raise ValueError(f"no encoding has the tensors {', '.join(sorted(found))}")
