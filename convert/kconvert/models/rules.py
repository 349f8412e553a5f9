"""What a manifest says of one family of names, and what is known of one name by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any, NamedTuple

from kconvert.formats.base import Scheme
from kconvert.models.sizes import lookup


@dataclass(frozen=True, slots=True)
class Rule:
    """One family of names: a Linear (`dtype` None: any encoding may spell it), or a tensor that is never quantised.

    It holds for models whose config.json has a true value at key `when` and none at `unless`. An `optional` name may be
    missing: always, or when the key that it names is true. `layer` is the placeholder of the layers that a name without one
    belongs to. `block` is that of an FP8 weight whose scales are not those of the model's other weights. For samples: a
    tensor of integers has those below `below`, and of one row of values only the first `filled` are not zero.
    """

    name: str
    role: str
    shape: tuple[str, ...]
    dtype: str | None = None
    when: str | None = None
    unless: str | None = None
    optional: bool | str = False
    layer: str | None = None
    block: tuple[int, int] | None = None
    below: str | None = None
    filled: str | None = None

    @property
    def placeholders(self) -> list[str]:
        return placeholders(self.name)

    def holds(self, config: Mapping[str, Any]) -> bool:
        return (self.when is None or bool(lookup(config, self.when))) and not (
            self.unless is not None and lookup(config, self.unless)
        )

    def applied(self, scheme: Scheme) -> Scheme:
        """The scheme that config.json has for the weight, with blocks of the weight's own."""
        return replace(scheme, block=self.block) if self.block and scheme.block else scheme

    def may_be_missing(self, config: Mapping[str, Any]) -> bool:
        return bool(lookup(config, self.optional)) if isinstance(self.optional, str) else self.optional


class Match(NamedTuple):
    """A name that a rule owns, the layer and expert it belongs to, and the shape that the model's dimensions give it.

    A Linear's shape is [out, in]; with three dimensions it is a stack of experts, see formats.stacks.
    """

    rule: Rule
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    optional: bool = False

    @property
    def stack(self) -> int | None:
        """How many matrices a Linear stacks, if it does."""
        return self.shape[0] if len(self.shape) == 3 else None

    @property
    def matrix(self) -> tuple[int, int]:
        """A Linear's shape [out, in], with the rows of stacked matrices one after the other."""
        return matrix(self.shape)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """See Match.matrix."""
    return math.prod(shape[:-1]), shape[-1]


@dataclass(frozen=True, slots=True)
class StackRule:
    """Matrices of experts in one tensor: for each expert those called `of`, one below the other, in the tensor `name`.

    `bare`: the tensor is called so by itself, without `.weight`. `plain`: it is so only where the weights are not quantised.
    """

    name: str
    of: tuple[str, ...]
    bare: bool = False
    plain: bool = False

    def respelt(self, prefixes: Mapping[str, str]) -> StackRule:
        """With other names, see `respell`."""
        return replace(self, name=respell(self.name, prefixes), of=tuple(respell(name, prefixes) for name in self.of))


def respell(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the first of `prefixes` that it begins with replaced by what that maps to."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(found, "") + name.removeprefix(found)


def placeholders(template: str) -> list[str]:
    """The names in braces in a template, from left to right."""
    return [field for _, field, _, _ in Formatter().parse(template) if field is not None]
