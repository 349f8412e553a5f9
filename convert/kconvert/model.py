"""A checkpoint understood: its tensors gathered into weights, each with role, shape and format.

Nothing is guessed: a tensor that no rule owns, a missing part or a shape that disagrees is an error naming it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from kconvert import formats
from kconvert.catalogue import manifest_for
from kconvert.checkpoint.config import QuantizationConfig, Scheme
from kconvert.checkpoint.source import Checkpoint, Tensor
from kconvert.errors import KconvertError
from kconvert.formats import Format, Part
from kconvert.formats.dense import Dense
from kconvert.manifest import Manifest, Names

# Scales of the key/value cache describe activations, not weights; they lose their meaning with the quantisation.
CACHE_SUFFIXES = frozenset({"k_scale", "v_scale", "q_scale"})


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [rows, cols] = [out, in] of the model; `tensors` spell it, in the order of `format.parts(rows, cols)`.

    `companions` lie beside it and do not enter its values; see formats.companions.
    """

    name: str
    role: str
    rows: int
    cols: int
    format: Format
    tensors: tuple[Tensor, ...]
    layer: int | None = None
    expert: int | None = None
    companions: tuple[Tensor, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        return parts_of(self.format, self.rows, self.cols)

    @property
    def copied(self) -> tuple[Tensor, ...]:
        """What a copy of the weight as it is consists of: beside values that are plain, scales of activations mean nothing."""
        return self.tensors if isinstance(self.format, Dense) else (*self.tensors, *self.companions)


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor that is no Linear: it is copied as it is."""

    tensor: Tensor
    role: str
    layer: int | None = None


@dataclass(frozen=True)
class Model:
    """`weights` and `plain` in natural order of their names; `dropped` are the tensors that a conversion leaves behind."""

    checkpoint: Checkpoint
    manifest: Manifest
    quantization: QuantizationConfig
    weights: tuple[Weight, ...]
    plain: tuple[Plain, ...]
    dropped: tuple[Tensor, ...]

    @property
    def parameters(self) -> int:
        """Weights and plain tensors' elements: what people call the size of the model."""
        weights = sum(weight.rows * weight.cols for weight in self.weights)
        return weights + sum(math.prod(plain.tensor.shape) for plain in self.plain)

    def select(self, include: Iterable[str], exclude: Iterable[str]) -> Model:
        """Only the weights and tensors whose names match a glob of `include` (none: all) and none of `exclude`."""
        include, exclude = tuple(include), tuple(exclude)
        if not include and not exclude:
            return self

        def wanted(name: str) -> bool:
            hit = not include or any(fnmatchcase(name, glob) for glob in include)
            return hit and not any(fnmatchcase(name, glob) for glob in exclude)

        weights = tuple(weight for weight in self.weights if wanted(weight.name))
        plain = tuple(plain for plain in self.plain if wanted(plain.tensor.name))
        if not weights and not plain:
            raise KconvertError("--include and --exclude leave no tensor; `kconvert inspect` lists the names' patterns")
        return Model(self.checkpoint, self.manifest, self.quantization, weights, plain, self.dropped)


@lru_cache(maxsize=4096)
def parts_of(format: Format, rows: int, cols: int) -> tuple[Part, ...]:
    """`format.parts(rows, cols)`, shared: a model has 70,000 weights in a handful of shapes."""
    return format.parts(rows, cols)


@lru_cache(maxsize=4096)
def _recognise(
    scheme: Scheme | None, facts: tuple[tuple[str, str, tuple[int, ...]], ...], shape: tuple[int, int] | None
) -> tuple[Format, int, int, tuple[Part, ...], Part | None]:
    """`formats.recognise`, the parts and the first that is not as it must be, of (suffix, dtype, shape) triples; shared for
    the same reason."""
    found = {suffix: (dtype, tensor_shape) for suffix, dtype, tensor_shape in facts}
    format, (rows, cols) = formats.recognise(scheme, found, shape)
    parts = parts_of(format, rows, cols)
    return format, rows, cols, parts, next((part for part in parts if not part.fits(*found[part.suffix])), None)


DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(piece) if piece.isdigit() else piece for piece in DIGITS.split(name)]


def understand(checkpoint: Checkpoint, partial: bool = False) -> Model:
    """Match every tensor of the checkpoint to the manifest of its model; KconvertError for the first that does not fit.

    A `partial` checkpoint may lack some of the model's weights.
    """
    manifest = manifest_for(checkpoint.config)
    names = manifest.bind(checkpoint.config)
    quantization = manifest.quantization(checkpoint.config)
    modules, plain, dropped = _sort_out(checkpoint, names)
    weights = [_weight(name, modules[name], names, quantization) for name in sorted(modules, key=natural_key)]
    if not partial:
        _check_complete(checkpoint, names, modules, {p.tensor.name for p in plain})
    plain.sort(key=lambda p: natural_key(p.tensor.name))
    return Model(checkpoint, manifest, quantization, tuple(weights), tuple(plain), tuple(dropped))


def _sort_out(checkpoint: Checkpoint, names: Names) -> tuple[dict[str, dict[str, Tensor]], list[Plain], list[Tensor]]:
    """Every tensor is part of a Linear, plain, or dropped by rule."""
    modules: dict[str, dict[str, Tensor]] = {}
    plain: list[Plain] = []
    dropped: list[Tensor] = []
    unknown: list[Tensor] = []
    for name, tensor in checkpoint.tensors.items():
        if (match := names.tensor(name)) is not None:
            if tensor.shape != match.shape:
                raise KconvertError(f"{tensor} has the shape {list(tensor.shape)}, the model's is {list(match.shape)}")
            plain.append(Plain(tensor, match.rule.role, match.layer))
        elif name.rpartition(".")[2] in CACHE_SUFFIXES:
            dropped.append(tensor)
        elif (spelling := names.spelling(name)) is not None:
            weight, suffix = spelling
            modules.setdefault(weight, {})[suffix] = tensor
        elif (role := names.manifest.plain_role(name)) is not None:
            plain.append(Plain(tensor, role))
        else:
            unknown.append(tensor)
    if unknown and not names.manifest.accepts_any:
        raise KconvertError(
            f"{unknown[0]} belongs to no weight that the manifest {names.manifest.name} knows; remove it, or add it there"
        )
    _sort_out_unknown(unknown, modules, plain)
    return modules, plain, dropped


def _sort_out_unknown(unknown: list[Tensor], modules: dict[str, dict[str, Tensor]], plain: list[Plain]) -> None:
    """Without names to go by, a weight is what has a tensor that only encoded weights have; matrices alone are plain."""
    split = [(tensor, *tensor.name.rpartition(".")[::2]) for tensor in unknown]
    encoded = {module for _, module, suffix in split if suffix in formats.QUANTISED_SUFFIXES}
    for tensor, module, suffix in split:
        if module in encoded and suffix in formats.SUFFIXES:
            modules.setdefault(module, {})[suffix] = tensor
        else:
            plain.append(Plain(tensor, "other"))


def _weight(name: str, found: Mapping[str, Tensor], names: Names, quantization: QuantizationConfig) -> Weight:
    match = names.linear(name)
    shape = None if match is None else match.matrix
    file = next(iter(found.values())).file
    # A config.json nested in a larger model's calls the weights as they are called in there.
    scheme = quantization.scheme_for(name) or quantization.scheme_for(name.removeprefix(names.manifest.prefix))
    if scheme is None and "weight" in found:
        scheme = formats.implied_scheme(quantization.schemes, found["weight"].dtype)
    try:
        facts = tuple([(suffix, tensor.dtype, tensor.shape) for suffix, tensor in found.items()])
        format, rows, cols, parts, misfit = _recognise(scheme, facts, shape)
    except ValueError as error:
        raise KconvertError(f"{file}: weight {name!r} cannot be read: {error}") from None
    tensors = tuple([found[part.suffix] for part in parts])
    if misfit is not None:
        tensor = found[misfit.suffix]
        raise KconvertError(
            f"{tensor} is {tensor.dtype} {list(tensor.shape)}, but a weight [{rows}, {cols}] in {format.label} has "
            f"{misfit.dtype} {list(misfit.shape)} there; the file and config.json do not belong together, or one is damaged"
        )
    if match is not None and match.stack not in (None, tensors[0].shape[0]):
        raise KconvertError(
            f"{tensors[0]} stacks {tensors[0].shape[0]} matrices, but the model has {match.stack} experts"
        )
    companions = tuple(tensor for tensor in found.values() if tensor not in tensors) if len(found) > len(parts) else ()
    role, layer, expert = ("other", None, None) if match is None else (match.rule.role, match.layer, match.expert)
    return Weight(name, role, rows, cols, format, tensors, layer, expert, companions)


def _check_complete(checkpoint: Checkpoint, names: Names, modules: Mapping[str, object], plain: set[str]) -> None:
    missing = names.missing(modules.keys() | plain)
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise KconvertError(
            f"{checkpoint.root}: {missing[0]!r}{rest} missing, which a {names.manifest.name} with this config.json has; "
            "fetch the rest of the checkpoint"
        )


def format_counts(weights: Iterable[Weight]) -> Counter[str]:
    """How many weights there are of each format's label."""
    return Counter(weight.format.label for weight in weights)
