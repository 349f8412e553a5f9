"""Model manifests: what tensors a model family has, by name, role, dtype and shape.

A manifest is a TOML file in the package `kconvert.manifests`, which says how one is written. Bound to a config.json it knows
every name that a sound checkpoint has.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import ChainMap
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from operator import itemgetter
from typing import Any

from kconvert.dialects import QuantizationConfig, quantization_tables, read_quantization
from kconvert.dialects.fields import MOST, brief
from kconvert.dialects.fp8 import MXFP8, MXFP8_BLOCK
from kconvert.errors import KconvertError
from kconvert.formats import Format, stack_spellings
from kconvert.models.indices import MAX_NAMES, Index, layers_in, numbers_of
from kconvert.models.rules import Match, Rule, StackRule, placeholders, respell
from kconvert.models.sizes import SAME, assign, divisor, evaluate, limited, lookup, restate
from kconvert.models.stacks import Stack


class UnknownSizeError(KconvertError):
    """config.json does not say what the manifest must know to tell the model's names and shapes."""


@dataclass(frozen=True)
class Manifest:
    """A model family; the fields are those of the TOML file.

    `accepts_any` (the generic manifest) demands no names. `serving` is what engines are told, by engine. `config`, `side_files`
    (name -> text) and `shard_name` are what `kconvert sample` writes, with the sizes that are `small` in any small one.
    """

    name: str
    model_types: tuple[str, ...]
    accepts_any: bool
    config_key: str | None
    prefix: str
    plain_prefixes: tuple[str, ...]
    stacked_method: str | None
    optional_layers: str | None
    dims: Mapping[str, str]
    defaults: Mapping[str, str]
    indices: Mapping[str, Index]
    limits: Mapping[str, str]
    divisors: Mapping[str, str]
    small: Mapping[str, int]
    per_layer: tuple[str, ...]
    rules: tuple[Rule, ...]
    stacks: tuple[StackRule, ...]
    also: Mapping[str, str]
    spelling: Mapping[str, Mapping[str, Any]]
    serving: Mapping[str, Mapping[str, Any]]
    config: dict[str, Any]
    side_files: Mapping[str, str]
    shard_name: str

    def section(self, config: dict[str, Any]) -> ChainMap[str, Any]:
        """config.json as the dimensions' keys see it: the nested table before the top level."""
        if self.config_key is None:
            return ChainMap(config)
        nested = config.get(self.config_key)
        if not isinstance(nested, dict):
            raise UnknownSizeError(f"config.json: {self.config_key} is no table, but the manifest {self.name} needs it")
        return ChainMap(nested, config)

    def plain_role(self, name: str) -> str | None:
        """The role of a tensor that is copied without being known; None when it should be known."""
        return next((prefix.rstrip(".") for prefix in self.plain_prefixes if name.startswith(prefix)), None)

    def quantization(self, config: Mapping[str, Any]) -> QuantizationConfig:
        """The quantisation of the Linears; none where only stacked experts have one. Blocks of a weight's own are MXFP8's
        whatever config.json says, as such weights keep their encoding when it declares another for the rest."""
        if self.has_encoded_stacks(config):
            return QuantizationConfig()
        found = read_quantization(config)
        own = (MXFP8,) if any(rule.block == MXFP8_BLOCK for rule in self.rules) else ()
        return replace(found, implied=tuple(dict.fromkeys((*found.implied, *own)))) if own else found

    def has_encoded_stacks(self, config: Mapping[str, Any]) -> bool:
        """Whether stacked experts are in MXFP4; see formats.stacks."""
        return self.stacked_method is not None and quant_method(config) == self.stacked_method

    def spell(self, format: Format) -> Format:
        """The format as this model's tensors are called, where not as usual."""
        fields = self.spelling.get(format.label.partition(" ")[0])
        return replace(format, **fields) if fields else format  # type: ignore[type-var]

    def respelt(self, tensors: Collection[str]) -> Manifest:
        """This manifest for a checkpoint with these tensors, some of which may be called as `also` says."""

        def has(prefix: str) -> bool:
            return any(name.startswith(prefix) for name in tensors)

        prefixes = {usual: other for usual, other in self.also.items() if not has(usual) and has(other)}
        if not prefixes:
            return self
        rules = (replace(rule, name=respell(rule.name, prefixes)) for rule in self.rules)
        return replace(self, rules=tuple(rules), stacks=tuple(stack.respelt(prefixes) for stack in self.stacks))

    def resize(self, config: dict[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """A copy of config.json in which the symbols in `sizes` have these values; for samples."""
        resized = copy.deepcopy(config)
        section = self.section(resized)
        with self._explain_faults():
            before = self._sizes(section).get("layers", 0)
        for symbol, value in sizes.items():
            key = self._key(symbol, section)
            restate(section, key, SAME.get(symbol, ()), value)
            assign(section, key, value)
        with self._explain_faults():
            for key in self.per_layer:
                if isinstance(values := lookup(section, key), list):
                    del values[self._sizes(section).get("layers", 0) : before]
            for key, bound in self.limits.items():
                have = lookup(section, key)
                with suppress(KeyError):
                    if have is not None:
                        assign(section, key, self._limited(key, have, evaluate(bound, self._sizes(section))))
            for key, whole in self.divisors.items():
                with suppress(KeyError):
                    if type(have := lookup(section, key)) is int:
                        assign(section, key, divisor(evaluate(whole, self._sizes(section)), have))
        return resized

    def _key(self, symbol: str, section: Mapping[str, Any]) -> str:
        """Where config.json has the size `symbol`: at its key, or at that of the size that stands in for it."""
        if symbol not in self.dims:
            raise KconvertError(f"the manifest {self.name} has no {symbol}; it has {', '.join(self.dims)}")
        key, other = self.dims[symbol], self.dims.get(self.defaults.get(symbol, ""))
        return other if other and lookup(section, key) is None else key

    def _limited(self, key: str, have: Any, most: int) -> Any:
        """`have` without what is beyond `most`: of a list of layers some numbers, of other numbers what is too much."""
        if key not in {index.list for index in self.indices.values()}:
            return limited(have, most)
        kept = [number for number in layers_in(have, key) if number <= most]
        return ",".join(map(str, kept)) if isinstance(have, str) else kept

    def bind(self, config: dict[str, Any]) -> Names:
        """The names and shapes that a checkpoint with this config.json has; KconvertError when a dimension is missing."""
        section = self.section(config)
        with self._explain_faults():
            sizes = self._sizes(section)
            numbers: dict[str, tuple[int, ...]] = {}
            for name, index in self.indices.items():
                numbers[name] = numbers_of(index, section, sizes, numbers)
            names = Names(self, numbers, sizes)
            for rule in self.rules:
                shape = self._shape(rule, section, sizes)
                if shape is not None and (rule.layer is None or numbers[rule.layer]):
                    names.add(rule, shape, rule.may_be_missing(section))
        return names

    @contextmanager
    def _explain_faults(self) -> Iterator[None]:
        """Turn what goes wrong with the sizes of a config.json into one sentence."""
        try:
            yield
        except KeyError as error:
            key = self.dims[error.args[0]]
            raise UnknownSizeError(
                f"config.json: {key} is missing, but the manifest {self.name} needs a size there"
            ) from None
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise KconvertError(f"config.json: its sizes do not make a {self.name} ({error})") from None

    def _shape(self, rule: Rule, section: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """None where the model has no such tensors; optional ones need not have a size in config.json."""
        if not rule.holds(section):
            return None
        try:
            return tuple(evaluate(size, sizes) for size in rule.shape)
        except KeyError:
            if rule.may_be_missing(section):
                return None
            raise

    def _sizes(self, section: Mapping[str, Any]) -> dict[str, int]:
        """Every symbol that config.json or a default gives a size; those that no rule in force uses may be missing."""
        sizes: dict[str, int] = {}
        for symbol, key in self.dims.items():
            value = lookup(section, key)
            if value is None and symbol in self.defaults:
                value = evaluate(self.defaults[symbol], sizes)
            if value is None:
                continue
            if type(value) is int and value >= MOST:
                raise ValueError(f"{key} is {brief(value)}")
            if type(value) is not int or value < 0:
                raise KconvertError(
                    f"config.json: {key} is {brief(value)}, but the manifest {self.name} needs a size there"
                )
            sizes[symbol] = value
        return sizes


class Names:
    """A manifest bound to a model's dimensions."""

    def __init__(self, manifest: Manifest, numbers: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> None:
        self.manifest = manifest
        self._numbers = numbers
        self._sizes = sizes
        self._named_from = {name: self.size(index.named_from) for name, index in manifest.indices.items()}
        self._families: list[tuple[Rule, tuple[int, ...], bool]] = []
        self._count = 0

    def add(self, rule: Rule, shape: tuple[int, ...], optional: bool) -> None:
        """Let `rule` own its names; ValueError when they are too many to be a model's."""
        self._count += math.prod(len(self._numbers[placeholder]) for placeholder in rule.placeholders)
        if self._count > MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES:,} names")
        self._families.append((rule, shape, optional))

    def size(self, expression: str) -> int:
        """The value of an expression over the model's sizes."""
        return evaluate(expression, self._sizes)

    def kinds(self, layer: int) -> frozenset[str]:
        """The placeholders for numbers of layers that stand for this one."""
        return frozenset(
            name for name, found in self._numbers.items() if name.partition(".")[0] == "layer" and layer in found
        )

    def parameters(self, role: str) -> int:
        """The elements of all tensors in roles that begin with this word."""
        return sum(
            math.prod(shape) * math.prod(len(self._numbers[placeholder]) for placeholder in rule.placeholders)
            for rule, shape, _ in self._families
            if rule.role.partition(".")[0] == role
        )

    def match(self, name: str) -> Match | None:
        """What is known of `name`, a Linear's module or a whole tensor name."""
        return self._tensors.get(name) or self._linears.get(name)

    def linear(self, module: str) -> Match | None:
        """What is known of the Linear called `module`."""
        return self._linears.get(module)

    def is_matrix(self, module: str) -> bool:
        """Whether `module` is a Linear of one matrix."""
        match = self._linears.get(module)
        return match is not None and len(match.shape) != 3

    def in_stack(self, tensor: str) -> tuple[str, str] | None:
        """(Linear, suffix) of a tensor that belongs to a Linear which stacks matrices."""
        for weight, suffix in stack_spellings(tensor):
            if (match := self.linear(weight)) is not None and match.stack is not None:
                return weight, suffix
        return None

    def tensor(self, name: str) -> Match | None:
        """What is known of the tensor called `name`, which is part of no Linear."""
        return self._tensors.get(name)

    def below(self, name: str) -> int | None:
        """What the integers of the tensor called `name` are below; None where they may be any, or it has others."""
        match = self.tensor(name)
        return None if match is None or match.rule.below is None else self.size(match.rule.below)

    def expected(self) -> Iterator[tuple[str, Match]]:
        """Every name that the model has: modules of Linears and whole names of the other tensors."""
        yield from self._linears.items()
        yield from self._tensors.items()

    def missing(self, found: Container[str]) -> list[str]:
        """The expected names that a checkpoint with the names `found` lacks.

        Of the manifest's optional layers all names are there or none.
        """
        spare = set(self._numbers.get(self.manifest.optional_layers or "", ()))
        begun = {match.layer for name, match in self.expected() if match.layer in spare and name in found}
        return [
            name
            for name, match in self.expected()
            if name not in found and not match.optional and (match.layer not in spare or match.layer in begun)
        ]

    @cached_property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacks of experts that the model may have, by name."""
        found = {}
        for rule in self.manifest.stacks:
            places = placeholders(rule.name)
            (expert,) = set(placeholders(rule.of[0])) - set(places)
            for numbers in itertools.product(*(self._numbers[place] for place in places)):
                words = {place: self._word(place, number) for place, number in zip(places, numbers, strict=True)}
                templates = [_filled(member, {**words, expert: "%s"}) for member in rule.of]
                members = tuple([template % number for number in self._numbers[expert] for template in templates])
                name = _filled(rule.name, words)
                found[name] = Stack(name, members, len(templates), rule.bare, rule.plain)
        return found

    def _word(self, place: str, number: int) -> str:
        """The number that the placeholder stands for, as names have it."""
        return str(number - self._named_from[place])

    @cached_property
    def _linears(self) -> dict[str, Match]:
        return self._named(family for family in self._families if family[0].dtype is None)

    @cached_property
    def _tensors(self) -> dict[str, Match]:
        """Apart from the Linears, as they are few, and every tensor is looked for among them."""
        return self._named(family for family in self._families if family[0].dtype is not None)

    def _named(self, families: Iterable[tuple[Rule, tuple[int, ...], bool]]) -> dict[str, Match]:
        known: dict[str, Match] = {}
        for rule, shape, optional in families:
            places = rule.placeholders
            template = _filled(rule.name, dict.fromkeys(places, "%s"))
            words = itertools.product(*([self._word(place, n) for n in self._numbers[place]] for place in places))
            numbers = [*itertools.product(*(self._numbers[place] for place in places))]
            layers = _along("layer", places, numbers, self._numbers[rule.layer][0] if rule.layer else None)
            experts = _along("expert", places, numbers, None)
            facts = zip(repeat(rule), repeat(shape), layers, experts, repeat(optional), strict=False)
            known.update(zip(map(template.__mod__, words), map(Match._make, facts), strict=False))
        return known


def _along(
    axis: str, places: Sequence[str], numbers: Iterable[tuple[int, ...]], otherwise: int | None
) -> Iterable[int | None]:
    """Of the numbers that names have at `places` those on this axis; the same for all when it is none of them."""
    axes = [place.partition(".")[0] for place in places]
    return map(itemgetter(axes.index(axis)), numbers) if axis in axes else repeat(otherwise)


def _filled(template: str, words: Mapping[str, str]) -> str:
    """The template with words for its placeholders."""
    for place, word in words.items():
        template = template.replace(f"{{{place}}}", word)
    return template


def quant_method(config: Mapping[str, Any]) -> Any:
    """What config.json calls its quantisation; None when it has none."""
    return next(quantization_tables(config), {}).get("quant_method")
