"""The encodings: one module a family; a new one is its file and its line in FAMILIES."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kconvert.formats import dense, fp8, gptq, int8, mx, nvfp4, packed, stacks
from kconvert.formats.base import COMPANIONS, Family, Format, Found, Part, parts_of, tensor_name

if TYPE_CHECKING:
    from kconvert.formats.base import Scheme

__all__ = [
    "FAMILIES",
    "QUANTISED_SUFFIXES",
    "SUFFIXES",
    "TELLING_SUFFIXES",
    "Format",
    "Part",
    "from_scheme",
    "implied_scheme",
    "parts_of",
    "recognise",
    "spellings",
    "tensor_name",
]

FAMILIES: tuple[Family, ...] = (dense, packed, fp8, int8, mx, nvfp4, gptq, stacks)
ENCODED_SUFFIXES = frozenset().union(*(family.SUFFIXES for family in FAMILIES), dense.LEFTOVERS)
SUFFIXES = ENCODED_SUFFIXES | COMPANIONS
QUANTISED_SUFFIXES = ENCODED_SUFFIXES - dense.SUFFIXES
# Words that something else than a part of an encoded weight may be called by, too: a norm has a `scale`.
TELLING_SUFFIXES = QUANTISED_SUFFIXES - {"scale", "scales"}
# What gives away encodings that are met and not read.
UNREAD_PARTS = {"weight_scale_2": "ModelOpt's NVFP4"}


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


def implied_scheme(schemes: Iterable[Scheme], weight_dtype: str | None) -> Scheme | None:
    """The scheme of a weight that config.json leaves out although it lies there in F8, as lm_head may: the only one of FP8.

    None where there is no such scheme or more than one.
    """
    if weight_dtype != "F8_E4M3":
        return None
    formats = {format: scheme for scheme in schemes if (format := fp8.from_scheme(scheme)) is not None}
    return next(iter(formats.values())) if len(formats) == 1 else None


def recognise(scheme: Scheme | None, found: Found, shape: tuple[int, int] | None) -> tuple[Format, tuple[int, int]]:
    """The format and shape of the weight that these tensors {suffix: (dtype, shape)} spell; see base.Family.

    Companions may be among them. Raises ValueError, saying what does not fit, when they are not what the scheme makes.
    """
    found = {suffix: facts for suffix, facts in found.items() if suffix not in COMPANIONS}
    if unread := UNREAD_PARTS.keys() & found:
        suffix = min(unread)
        raise ValueError(f"its {suffix} is that of {UNREAD_PARTS[suffix]}, which is not read")
    if unknown := sorted(found.keys() - ENCODED_SUFFIXES):
        raise ValueError(f"no encoding has the tensors {', '.join(unknown)}")
    if not found:
        raise ValueError("it has nothing but what describes activations")
    if dense.holds(found) or found.keys() == dense.SUFFIXES:
        return dense.recognise(None, found, shape)
    if found.keys() >= {"weight", "scales"}:
        raise ValueError(f"its weight is {found['weight'][0]} with scales beside it as MLX has them, which is not read")
    if found.keys() <= stacks.SUFFIXES:
        return stacks.recognise(None, found, shape)
    if scheme is None:
        raise ValueError(f"it has {', '.join(sorted(found))}, but config.json declares no quantisation for it")
    family, declared = _declared(scheme)
    try:
        return family.recognise(declared, found, shape)
    except ValueError as error:
        raise ValueError(f"{error}, while config.json says it is {scheme}") from None


def _declared(scheme: Scheme) -> tuple[Family, Format]:
    for family in FAMILIES:
        format = family.from_scheme(scheme)
        if format is not None:
            return family, format
    meant = [family.READS for family in FAMILIES if (scheme.format, scheme.type) in family.KINDS]
    raise ValueError(f"its scheme {scheme} is not supported" + (f"; supported: {meant[0]}" if meant else ""))
