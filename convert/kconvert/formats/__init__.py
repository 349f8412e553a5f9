"""The encodings: one module a family; a new one is its file and its line in FAMILIES."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kconvert.formats import dense, fp8, int8, mx, nvfp4, packed, stacks
from kconvert.formats.base import Family, Format, Part, tensor_name

if TYPE_CHECKING:
    from kconvert.dialects.base import Scheme

__all__ = ["FAMILIES", "QUANTISED_SUFFIXES", "Format", "Part", "from_scheme", "recognise", "spellings", "tensor_name"]

FAMILIES: tuple[Family, ...] = (dense, packed, fp8, int8, mx, nvfp4, stacks)
SUFFIXES = frozenset().union(*(family.SUFFIXES for family in FAMILIES))
QUANTISED_SUFFIXES = SUFFIXES - dense.SUFFIXES


def spellings(tensor: str) -> Iterator[tuple[str, str, bool]]:
    """(weight, suffix, whether it is a stack's) for each way to make a tensor's name of the two; see base.tensor_name."""
    weight, _, suffix = tensor.rpartition(".")
    yield weight, suffix, False
    for suffix in stacks.SUFFIXES:
        if tensor.endswith(suffix):
            yield tensor.removesuffix(suffix), suffix, True


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
    claims = [family for family in FAMILIES if found.keys() <= family.SUFFIXES]
    if not claims:
        raise ValueError(f"no encoding has the tensors {', '.join(sorted(found))}")
    # Families share names of tensors, so config.json decides; a lone `weight` is dense whatever it says.
    declared = [family for family in claims if family is dense or (scheme and family.from_scheme(scheme))]
    return (declared or claims)[0].recognise(scheme, found, shape)
