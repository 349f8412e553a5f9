"""What a quantisation config says, in any dialect: schemes, and the modules that each is for.

Which scheme a module gets is compressed-tensors' rule (0.20, `utils/match.py` and `quantization/lifecycle/apply.py`): a
target that is its whole name comes before a pattern, a pattern before its class; of several patterns the first in alphabetical
order counts, of several groups with one target the last. `ignore` is of names, patterns and classes too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Protocol

from kconvert.dialects.fields import FILE, LANGUAGE_MODEL, PATTERN, Table, bare_name
from kconvert.formats.base import Scheme

NEEDLE = re.compile(r"re:(?:\.\*)?(\w+)(?![\w?*{|])(?!.*\(\?)")
GROUP = re.compile(r"\([^()]*\)")
# Classes of a module, itself and what it inherits from, as torch calls them. A checkpoint knows names only: all that it has
# quantised are Linears, or experts made of them, but for those that are called what embeddings are called.
EVERYTHING = ("Module",)  # as targets: also embeddings and lm_head, which some releases have quantised
LINEAR_CLASSES = frozenset({"Linear", *EVERYTHING})
EMBEDDING_CLASSES = frozenset({"Embedding", *EVERYTHING})
EMBEDDINGS = frozenset(
    {"embed_tokens", "embed_tokens_per_layer", "word_embeddings", "tok_embeddings", "embed_in", "wte"}
)


class Dialect(Protocol):
    """What a module of this package offers: to read the table of a config.json that is written in it.

    `METHODS` are its names in quant_method, in lower case and with hyphens, whichever of `-` and `_` a file has; a table
    without one that has a key of `SIGNS` is in it as well.
    Functions `…_table` write the table for an output.
    """

    METHODS: tuple[str, ...]
    SIGNS: frozenset[str]

    def read(self, table: Table) -> QuantizationConfig:
        """What the table says; KconvertError naming the key when it makes no sense."""
        ...


@dataclass(frozen=True)
class QuantizationConfig:
    """The schemes of a checkpoint, and the modules that none applies to.

    `spared` are the targets of groups that quantise no weights: they rank among the others, and leave what they hit alone.
    With `inside` a name stands for what is inside the module, too, and is a bare one, see fields.bare_name. `implied` are
    schemes that no module is given, but which a weight may have whose tensors can be nothing else. `file` says all this.
    `order` has the patterns of which the first counts, where that is not the first in alphabetical order. `aliases` gives
    another name of a module.
    """

    schemes: tuple[Scheme, ...] = ()
    ignore: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    inside: bool = False
    implied: tuple[Scheme, ...] = ()
    file: str = FILE
    aliases: Callable[[str], str] | None = None

    def scheme_for(self, *names: str) -> Scheme | None:
        """The scheme of the module that is called by any of these names, None when its weights are not quantised."""
        within: tuple[str, ...] = ()
        if self.aliases is not None:
            names = (*names, self.aliases(names[0]))
        if self.inside:
            bare = bare_name(names[0])
            names, within = (bare, *names), _around(bare)
        if self._ignored.first(names, within) is not None:
            return None
        target = self._targets.first(names, within)
        return None if target is None else self._by_target[target]

    @cached_property
    def _by_target(self) -> Mapping[str, Scheme | None]:
        return {target: scheme for scheme in self.schemes for target in scheme.targets} | dict.fromkeys(self.spared)

    @cached_property
    def _targets(self) -> _Targets:
        return _Targets(dict.fromkeys((*self.order, *sorted(self._by_target))))

    @cached_property
    def _ignored(self) -> _Targets:
        return _Targets(sorted(set(self.ignore)))


class _Targets:
    """Targets, each once, made ready for half a million names: patterns are compiled, whole names found by hash."""

    def __init__(self, targets: Iterable[str]) -> None:
        ordered = tuple(targets)
        # The library sorts whole names that have "re:" somewhere in the middle among the patterns.
        self._names = frozenset(target for target in ordered if PATTERN not in target)
        self._patterns = [(_needle(target), _matcher(target), target) for target in ordered if PATTERN in target]
        self._linear = next((target for target in ordered if target in LINEAR_CLASSES), None)
        self._embedding = next((target for target in ordered if target in EMBEDDING_CLASSES), None)

    def first(self, names: tuple[str, ...], within: tuple[str, ...] = ()) -> str | None:
        """The target that counts for the module with these names, inside others; None when there is none."""
        for name in (*names, *within) if self._names else ():
            if name in self._names:
                return name
        text = "\n".join(names)
        for needle, match, target in self._patterns:
            if needle in text and any(map(match, names)):
                return target
        if self._linear != self._embedding and names[0].rpartition(".")[2] in EMBEDDINGS:
            return self._embedding
        return self._linear


def _around(module: str) -> tuple[str, ...]:
    """The modules around this one, the nearest first."""
    around = []
    while (end := module.rfind(".")) >= 0:
        around.append(module := module[:end])
    return tuple(around)


def matches(module: str, pattern: str) -> bool:
    """compressed-tensors' rule: `re:` patterns match from the start of the module's name, others are the whole name."""
    return _matcher(pattern)(module) is not None if pattern.startswith(PATTERN) else pattern == module


@cache
def _matcher(target: str) -> Callable[[str], re.Match[str] | None]:
    is_pattern = target.startswith(PATTERN)
    return re.compile(target.removeprefix(PATTERN) if is_pattern else rf"{re.escape(target)}\Z").match


def _needle(target: str) -> str:
    """A word that is in every name that the pattern matches, "" where none is plain to see: to look for it is quicker."""
    found = NEEDLE.match(target)
    return found[1] if found and "|" not in GROUP.sub("", target) else ""


def by_name(rules: Iterable[tuple[str, Scheme]]) -> tuple[Scheme, ...]:
    """Schemes of modules, each with all the names of those that it is for."""
    names: dict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in rules:
        names[scheme].append(name)
    return tuple(replace(scheme, targets=tuple(found)) for scheme, found in names.items())


def both_names(modules: Iterable[str]) -> list[str]:
    """The modules' names, those of a language model inside a multimodal one also without its prefix."""
    modules = tuple(modules)
    stripped = (name.removeprefix(LANGUAGE_MODEL) for name in modules if name.startswith(LANGUAGE_MODEL))
    return [*modules, *stripped]
