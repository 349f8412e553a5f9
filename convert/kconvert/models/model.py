"""A checkpoint understood: its tensors gathered into weights, each with role, shape and format.

Nothing is guessed: a tensor that no rule owns, a missing part or a shape that disagrees is an error naming it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple, NoReturn, TypeAlias

from kconvert import formats
from kconvert.checkpoint.listing import CONFIG_NAME
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import QuantizationConfig, declared_beside
from kconvert.errors import KconvertError
from kconvert.formats import Format, Part, parts_of
from kconvert.formats.base import Scheme
from kconvert.formats.engines.amx import TENSOR
from kconvert.models.catalogue import GENERIC, load_manifest, manifest_for
from kconvert.models.copies import undecoded
from kconvert.models.manifest import Manifest, Names, UnknownSizeError
from kconvert.models.roles import Role, guess
from kconvert.models.rules import matrix
from kconvert.models.sizes import lookup
from kconvert.models.sorting import Plain, Sorted, shows_experts, sort_out
from kconvert.models.stacks import Stack

Facts: TypeAlias = "tuple[tuple[str, str, tuple[int, ...]], ...]"
Recognised: TypeAlias = "tuple[Format, int, int, tuple[Part, ...], Part | None]"
Recogniser: TypeAlias = "Callable[[Scheme | None, Facts, tuple[int, ...] | None], Recognised]"


class Weight(NamedTuple):
    """A matrix [rows, cols] = [out, in] of the model; `tensors` spell it, in the order of `format.parts(rows, cols)`.

    `companions` lie beside it and do not enter its values; see formats.base.
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
        return (*self.tensors, *self.companions) if self.format.quantised else self.tensors


@dataclass(frozen=True)
class Model:
    """`weights` and `plain` in natural order of their names; `dropped` are the tensors that a conversion leaves behind.

    `stacks` are tensors in which several of the weights lie, or in which models like this one have them; see models.stacks.
    `findings` say how the checkpoint's names differ from those of the model's manifest, if they do.
    """

    checkpoint: Checkpoint
    manifest: Manifest
    quantization: QuantizationConfig
    weights: tuple[Weight, ...]
    plain: tuple[Plain, ...]
    dropped: tuple[Tensor, ...]
    stacks: tuple[Stack, ...] = ()
    findings: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Weights and plain tensors' elements: what people call the size of the model."""
        weights = sum(weight.rows * weight.cols for weight in self.weights)
        return weights + sum(math.prod(plain.tensor.shape) for plain in self.plain)

    @property
    def layers(self) -> float:
        """The number of layers without MTP; unbounded where config.json does not say it."""
        key = self.manifest.dims.get("layers", "num_hidden_layers")
        count = lookup(self.manifest.section(self.checkpoint.config), key)
        return count if isinstance(count, int) else math.inf

    def select(self, include: Iterable[str], exclude: Iterable[str]) -> Model:
        """Only the weights and tensors whose names match a glob of `include` (none: all) and none of `exclude`.

        KconvertError for a glob that matches no name.
        """
        include, exclude = tuple(include), tuple(exclude)
        if not include and not exclude:
            return self

        names = [*(weight.name for weight in self.weights), *(plain.tensor.name for plain in self.plain)]
        form = f"globs are of whole names, of which {max(names, key=len, default='')!r} is one"
        for glob in (*include, *exclude):
            if not any(fnmatchcase(name, glob) for name in names):
                raise KconvertError(f"{glob!r} matches no weight or tensor; {form}")

        def wanted(name: str) -> bool:
            hit = not include or any(fnmatchcase(name, glob) for glob in include)
            return hit and not any(fnmatchcase(name, glob) for glob in exclude)

        weights = tuple(weight for weight in self.weights if wanted(weight.name))
        plain = tuple(plain for plain in self.plain if wanted(plain.tensor.name))
        if not weights and not plain:
            raise KconvertError(f"--include and --exclude leave no tensor; {form}")
        return replace(self, weights=weights, plain=plain)


def _recogniser(quantization: QuantizationConfig) -> Recogniser:
    """`formats.recognise` by a scheme or another one of the quantisation's, the parts and the first that is not as it must be,
    of (suffix, dtype, shape) triples; shared for the same reason."""

    @lru_cache(maxsize=4096)
    def recognise(scheme: Scheme | None, facts: Facts, whole: tuple[int, ...] | None) -> Recognised:
        shape = None if whole is None else matrix(whole)
        found = {suffix: (dtype, tensor_shape) for suffix, dtype, tensor_shape in facts}
        scheme = formats.fitting_scheme(scheme, (*quantization.schemes, *quantization.implied), found, shape)
        format, (rows, cols) = formats.recognise(scheme, found, shape, quantization.file)
        parts = parts_of(format, rows, cols)
        return format, rows, cols, parts, next((part for part in parts if not part.fits(*found[part.suffix])), None)

    return recognise


DIGITS = re.compile("0*([0-9]{1,18})")


def natural_key(name: str) -> str:
    """Sorts layer 2 before layer 10, by putting their lengths before numbers, and a sign before these that sorts first."""
    before, dot, word = name.rpartition(".")
    return f"{_natural_words(before)}{dot}{_natural_word(word)}"


@lru_cache(maxsize=1 << 12)  # the matrices of an expert follow one another, and only their last words differ
def _natural_words(words: str) -> str:
    return ".".join(map(_natural_word, words.split(".")))


@lru_cache(maxsize=1 << 16)  # names of one model are made of the same words
def _natural_word(word: str) -> str:
    return DIGITS.sub(lambda match: f"\0{len(match[1]):c}{match[1]}", word)


def understand(checkpoint: Checkpoint, partial: bool = False) -> Model:
    """Gather the checkpoint's tensors into weights; KconvertError for the first thing that does not fit.

    The names are those of the model's manifest. What has more names is read by its own quantization_config and dtypes as far
    as the manifest does not know it; what has others in their place, or a config.json without the sizes that the manifest
    needs, altogether so. `findings` tell.
    A `partial` checkpoint may lack some of the model's weights.
    """
    manifest = manifest_for(checkpoint.config, checkpoint.tensors)
    try:
        names = manifest.bind(checkpoint.config)
    except UnknownSizeError as unknown:
        return _by_names_alone(checkpoint, str(unknown))
    model, unlisted, missing = _read(checkpoint, names)
    if missing and not partial:
        if not _are_renamed(missing, unlisted, model, names):
            _refuse_incomplete(model, missing)
        one, other = missing[0], unlisted[0]
        what = f"it has other names than the manifest {manifest.name} knows ({one!r} is not there, but {other!r})"
        return _by_names_alone(checkpoint, what)
    if unlisted and not manifest.accepts_any:
        more = f" and {len(unlisted) - 1:,} more" if len(unlisted) > 1 else ""
        finding = (
            f"{unlisted[0]}{more} not listed in the manifest {manifest.name}; read by dtype and quantization_config"
        )
        return replace(model, findings=(finding,))
    return model


def _by_names_alone(checkpoint: Checkpoint, reason: str) -> Model:
    """The model as the generic manifest reads it, with a finding that says why no other does."""
    model, _, _ = _read(checkpoint, load_manifest(GENERIC).bind(checkpoint.config))
    return replace(model, findings=(f"{reason}, so what tensors mean is taken from their names alone",))


def _read(checkpoint: Checkpoint, names: Names) -> tuple[Model, list[str], list[str]]:
    """The model as read by these names; weights and tensors that they do not list; those listed that are missing."""
    found = sort_out(checkpoint, names)
    quantization = names.manifest.quantization(checkpoint.config)
    try:
        weights = _gather(found, names, quantization)
    except KconvertError:
        if quantization.schemes or not (beside := _declared_beside(checkpoint)).schemes:
            raise
        quantization, weights = beside, _gather(found, names, beside)
    plain = sorted(found.plain.values(), key=lambda p: natural_key(p.tensor.name))
    stacks = tuple(found.stacks.values())
    _check_blocks(checkpoint, stacks, weights)
    model = Model(checkpoint, names.manifest, quantization, weights, tuple(plain), tuple(found.dropped), stacks)
    known = {tensor.name: tensor for tensor in found.unlisted}
    unlisted = [w.name for w in weights if w.tensors[0].name in known]
    unlisted += [p.tensor.name for p in plain if p.tensor.name in known]
    return model, unlisted, names.missing(found)


def _gather(found: Sorted, names: Names, quantization: QuantizationConfig) -> tuple[Weight, ...]:
    """The weights of what is sorted out, in natural order of their names."""
    guesses = not names.manifest.accepts_any or shows_experts(found.modules)
    recognise = _recogniser(quantization)
    return tuple(
        _weight(name, found.modules[name], names, quantization, recognise, guesses)
        for name in sorted(found.modules, key=natural_key)
    )


def _check_blocks(checkpoint: Checkpoint, stacks: Iterable[Stack], weights: Iterable[Weight]) -> None:
    """KconvertError where matrices lie one above the other in a stack and do not begin with a block that has a scale: some
    quantise them together, others one by one, and nothing says which."""
    firsts = {stack.members[0]: stack for stack in stacks if stack.width > 1 and stack.members}
    for weight in weights if firsts else ():
        stack = firsts.get(weight.name)
        if stack is None or weight.tensors[0].name in checkpoint.tensors:
            continue
        for part, tensor in zip(weight.parts, weight.tensors, strict=True):
            if part.every and weight.rows % part.every and len(tensor.shape) > 1:
                raise KconvertError(
                    f"{tensor.file}: the {stack.width} matrices of each expert in {stack.name!r} have {weight.rows} rows, "
                    f"which are no whole blocks of {part.every}, so which scales are whose is not known; convert the "
                    "checkpoint that was quantised"
                )


def _are_renamed(missing: list[str], unlisted: list[str], model: Model, names: Names) -> bool:
    """Whether for each missing weight there is an unlisted one of the same shape: then it goes by another name."""
    shapes: dict[str, tuple[int, ...]] = {weight.name: (weight.rows, weight.cols) for weight in model.weights}
    shapes |= {plain.tensor.name: plain.tensor.shape for plain in model.plain}
    have = Counter(shapes[name] for name in unlisted)
    want = Counter(match.shape for name in missing if (match := names.match(name)) is not None)
    return not want - have


def _refuse_incomplete(model: Model, missing: list[str]) -> NoReturn:
    refuse_undecoded(model)  # may be what is missing, in other words
    rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise KconvertError(
        f"{model.checkpoint.root}: {missing[0]!r}{rest} missing, which a {model.manifest.name} with this config.json has; "
        "fetch the rest of the checkpoint"
    )


def _declared_beside(checkpoint: Checkpoint) -> QuantizationConfig:
    """What another file says of a checkpoint that is quantised as config.json does not say; KconvertError when it is not read,
    or when both are missing."""
    files = {*checkpoint.side_files, *checkpoint.left_out}
    try:
        found = declared_beside(files, lambda name: checkpoint.side_file(name).read_bytes(), checkpoint.config)
    except KconvertError as error:
        raise KconvertError(f"{checkpoint.root}/{error}") from None
    if found is None and not checkpoint.config:
        path = checkpoint.root / CONFIG_NAME
        raise KconvertError(
            f"{path} is missing or empty, and only it says how weights are quantised, as these are; fetch it"
        )
    return found or QuantizationConfig()


def refuse_undecoded(model: Model) -> None:
    """KconvertError when a tensor that would be copied may be codes that nothing in the copy declares."""
    for tensor, reason in undecoded(model.plain):
        if not model.quantization.schemes:
            _declared_beside(model.checkpoint)
        raise KconvertError(
            f"{tensor} {reason}, which no rule decodes; copied as it is, it would be read as values, so this checkpoint cannot "
            "be converted"
        )


def _weight(
    name: str,
    found: Mapping[str, Tensor],
    names: Names,
    quantization: QuantizationConfig,
    recognise: Recogniser,
    guesses: bool,
) -> Weight:
    match = names.linear(name) or names.tensor(f"{name}.weight")
    shape = None if match is None else match.shape
    # A config.json nested in a larger model's calls the weights as they are called in there.
    inside = name.removeprefix(names.manifest.prefix)
    scheme = quantization.scheme_for(name, inside) if inside != name else quantization.scheme_for(name)
    if scheme is not None and match is not None:
        scheme = match.rule.applied(scheme)
    try:
        facts = tuple([(suffix, dtype, shape) for suffix, (_, dtype, shape, _, _, _) in found.items()])
        format, rows, cols, parts, misfit = recognise(scheme, facts, shape)
    except ValueError as error:
        first = next(iter(found.values()))
        if TENSOR.fullmatch(first.name):
            raise KconvertError(
                f"{first} is of AMX weights, packed for KTransformers, which are no model to convert or to cut; give the "
                "checkpoint that they were packed of"
            ) from None
        raise KconvertError(f"{first.file}: weight {name!r} cannot be read: {error}") from None
    tensors = tuple([found[part.suffix] for part in parts])
    if misfit is not None:
        tensor = found[misfit.suffix]
        raise KconvertError(
            f"{tensor} is {tensor.dtype} {list(tensor.shape)}, but a weight [{rows}, {cols}] in {format.label} has "
            f"{misfit.dtype} {list(misfit.shape)} there; the file and {quantization.file} do not belong together, or one is "
            "damaged"
        )
    if shape is not None and len(shape) == 3 and shape[0] != tensors[0].shape[0]:
        raise KconvertError(f"{tensors[0]} stacks {tensors[0].shape[0]} matrices, but the model has {shape[0]} experts")
    companions = tuple(tensor for tensor in found.values() if tensor not in tensors) if len(found) > len(parts) else ()
    if match is not None:
        role, layer, expert = match.rule.role, match.layer, match.expert
    else:
        role, layer, expert = guess(name) if guesses else Role("other")
    return Weight(name, role, rows, cols, format, tensors, layer, expert, companions)


def format_counts(weights: Iterable[Weight]) -> Counter[str]:
    """How many weights there are of each format's label."""
    found = [weight.format for weight in weights]
    formats = dict(zip(map(id, found), found, strict=True))  # a handful, so each spells its label once
    counts: Counter[str] = Counter()
    for key, count in Counter(map(id, found)).items():
        counts[formats[key].label] += count
    return counts
