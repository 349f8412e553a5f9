"""The encodings: one module a family; a new one is its file and its line in FAMILIES."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kconvert.formats import dense, fp8, gptq, int8, mx, nvfp4, packed, stacks
from kconvert.formats.base import COMPANIONS, Family, Format, Found, Part, parts_of, tensor_name
from kconvert.formats.engines import mlx

if TYPE_CHECKING:
    from kconvert.formats.base import Scheme

__all__ = [
    "FAMILIES",
    "QUANTISED_SUFFIXES",
    "SUFFIXES",
    "TELLING_SUFFIXES",
    "Format",
    "Part",
    "fitting_scheme",
    "from_scheme",
    "parts_of",
    "recognise",
    "stack_spellings",
    "tensor_name",
]

FAMILIES: tuple[Family, ...] = (dense, packed, fp8, int8, mx, nvfp4, gptq, mlx, stacks)
# What beside a weight enters what is computed with it, so that its codes and scales alone are not its value.
FACTORS = {
    "pre_quant_scale": "a factor of what goes into it (AWQ, SmoothQuant)",
    "svdquant_lora_a": "part of a product that is added to it (SVDQuant)",
    "svdquant_lora_b": "part of a product that is added to it (SVDQuant)",
}
ENCODED_SUFFIXES = frozenset().union(*(family.SUFFIXES for family in FAMILIES), dense.LEFTOVERS)
SUFFIXES = ENCODED_SUFFIXES | FACTORS.keys() | COMPANIONS
QUANTISED_SUFFIXES = (ENCODED_SUFFIXES | FACTORS.keys()) - dense.SUFFIXES
# Words that something else than a part of an encoded weight may be called by, too: a norm has a `scale`.
TELLING_SUFFIXES = QUANTISED_SUFFIXES - {"scale", "scales"}


def stack_spellings(tensor: str) -> Iterator[tuple[str, str]]:
    """(weight, suffix) for each way to make the name of a stack's tensor of the two; see base.tensor_name."""
    for suffix in stacks.SUFFIXES:
        if tensor.endswith(suffix):
            yield tensor.removesuffix(suffix), suffix


def from_scheme(scheme: Scheme) -> Format:
    """The format in which a scheme of config.json spells a weight; ValueError when no family knows it."""
    return _declared(scheme)[1]


def fitting_scheme(
    scheme: Scheme | None, schemes: Iterable[Scheme], found: Found, shape: tuple[int, int] | None
) -> Scheme | None:
    """The scheme that these tensors are spelt by: `scheme`, which config.json gives the weight, if they can be; else the only
    one of its `schemes` of floats that they can be; else `scheme` all the same.

    Published configs leave out floats that are quantised (lm_head), exclude them, or name a module whose parts are in several
    encodings; what they say of integers is right.
    """
    if _spelt_by(scheme, found, shape) is None:
        floats = (other for other in schemes if other.type == "float")
        spelt = {format: other for other in floats if (format := _spelt_by(other, found, shape)) is not None}
        if len(spelt) == 1:
            return next(iter(spelt.values()))
    return scheme


def _spelt_by(scheme: Scheme | None, found: Found, shape: tuple[int, int] | None) -> Format | None:
    """The format in which these tensors spell a weight by this scheme; None when they do not."""
    try:
        format, size = recognise(scheme, found, shape)
        return format if all(part.fits(*found[part.suffix]) for part in parts_of(format, *size)) else None
    except ValueError:
        return None


def recognise(
    scheme: Scheme | None, found: Found, shape: tuple[int, int] | None, said_by: str = "config.json"
) -> tuple[Format, tuple[int, int]]:
    """The format and shape of the weight that these tensors {suffix: (dtype, shape)} spell; see base.Family.

    Companions may be among them. `said_by` is the file that has the scheme. Raises ValueError, saying what does not fit, when
    they are not what the scheme makes.
    """
    found = {suffix: facts for suffix, facts in found.items() if suffix not in COMPANIONS}
    if factors := FACTORS.keys() & found:
        suffix = min(factors)
        raise ValueError(f"its {suffix} is {FACTORS[suffix]}, which is not read; convert the model that was quantised")
    if unknown := sorted(found.keys() - ENCODED_SUFFIXES):
        raise ValueError(f"no encoding has the tensors {', '.join(unknown)}")
    if not found:
        raise ValueError("it has nothing but what describes activations")
    if dense.holds(found) or found.keys() == dense.SUFFIXES:
        return dense.recognise(None, found, shape)
    if any("." in suffix for suffix in found):
        return mlx.recognise_halves(found, shape)
    if found.keys() <= stacks.SUFFIXES:
        return stacks.recognise(None, found, shape)
    if (
        found.keys() >= {"weight", "scales"}
        and found["weight"][0] == mx.WORDS
        and (scheme is None or scheme.format != mlx.FORMAT)
    ):
        said = "declares no quantisation for it" if scheme is None else f"says it is {scheme}"
        raise ValueError(f"its weight is {mx.WORDS} with scales beside it as MLX has them, but {said_by} {said}")
    if scheme is None:
        raise ValueError(f"it has {', '.join(sorted(found))}, but {said_by} declares no quantisation for it")
    family, declared = _declared(scheme)
    try:
        return family.recognise(declared, found, shape)
    except ValueError as error:
        raise ValueError(f"{error}, while {said_by} says it is {scheme}") from None


def _declared(scheme: Scheme) -> tuple[Family, Format]:
    for family in FAMILIES:
        format = family.from_scheme(scheme)
        if format is not None:
            return family, format
    meant = [family.READS for family in FAMILIES if (scheme.format, scheme.type) in family.KINDS]
    raise ValueError(f"its scheme {scheme} is not supported" + (f"; supported: {meant[0]}" if meant else ""))
