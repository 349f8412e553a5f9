"""Model manifests: what tensors a model family has, by name, role, dtype and shape.

A manifest is a TOML file in `kconvert/manifests`. Bound to a config.json it knows every name that a sound checkpoint has.
"""

from __future__ import annotations

import ast
import copy
import itertools
import operator
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from kconvert.errors import KconvertError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GENERIC = "generic"
PLACEHOLDER = re.compile(r"\{([a-z_.]+)\}")
NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]*)(?![^.])")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


@dataclass(frozen=True, slots=True)
class Rule:
    """One family of names: a Linear (`dtype` None: any encoding may spell it), or a tensor that is never quantised."""

    name: str
    role: str
    shape: tuple[str, ...]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A name that a rule owns, its numbers by axis, and the shape that the model's dimensions give it."""

    rule: Rule
    indices: Mapping[str, int]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A model family. `dims` maps symbols to keys of config.json, `indices` placeholders to ranges over the symbols,
    `limits` other keys of config.json to the symbol that bounds them.

    `accepts_any` (the generic manifest) demands no names. `config`, `side_files` (name -> text) and `shard_name` are what
    `kconvert sample` writes.
    """

    name: str
    model_types: tuple[str, ...]
    accepts_any: bool
    dims: Mapping[str, str]
    indices: Mapping[str, tuple[str, str]]
    limits: Mapping[str, str]
    rules: tuple[Rule, ...]
    config: Mapping[str, Any]
    side_files: Mapping[str, str]
    shard_name: str

    def resize(self, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """A copy of config.json in which the symbols in `sizes` have these values; for samples."""
        resized = copy.deepcopy(dict(config))
        for symbol, value in sizes.items():
            if symbol not in self.dims:
                raise KconvertError(f"the manifest {self.name} has no {symbol}; it has {', '.join(self.dims)}")
            resized[self.dims[symbol]] = value
        for key, symbol in self.limits.items():
            if key in resized:
                resized[key] = min(resized[key], resized[self.dims[symbol]])
        return resized

    def bind(self, config: Mapping[str, Any]) -> Names:
        """The names and shapes that a checkpoint with this config.json has; KconvertError when a dimension is missing."""
        sizes: dict[str, int] = {}
        for symbol, key in self.dims.items():
            value = config.get(key)
            if type(value) is not int or value < 0:
                raise KconvertError(f"config.json: {key} is {value!r}, but the manifest {self.name} needs a size there")
            sizes[symbol] = value
        ranges = {name: range(evaluate(a, sizes), evaluate(b, sizes)) for name, (a, b) in self.indices.items()}
        shapes = {rule: tuple(evaluate(size, sizes) for size in rule.shape) for rule in self.rules}
        return Names(self, ranges, shapes)


class Names:
    """A manifest bound to a model's dimensions."""

    def __init__(self, manifest: Manifest, ranges: Mapping[str, range], shapes: Mapping[Rule, tuple[int, ...]]) -> None:
        self.manifest = manifest
        self._ranges = ranges
        self._shapes = shapes
        self._by_template: dict[str, list[Rule]] = {}
        for rule in manifest.rules:
            self._by_template.setdefault(PLACEHOLDER.sub("#", rule.name), []).append(rule)

    def match(self, name: str) -> Match | None:
        """The rule that owns `name`, a Linear's module or a whole tensor name."""
        numbers = [int(number) for number in NUMBER.findall(name)]
        for rule in self._by_template.get(NUMBER.sub("#", name), ()):
            placeholders = PLACEHOLDER.findall(rule.name)
            if all(number in self._ranges[p] for p, number in zip(placeholders, numbers, strict=True)):
                indices = {p.partition(".")[0]: number for p, number in zip(placeholders, numbers, strict=True)}
                return Match(rule, indices, self._shapes[rule])
        return None

    def expected(self) -> Iterator[tuple[str, Match]]:
        """Every name that the model has: modules of Linears and whole names of the other tensors."""
        for rule in self.manifest.rules:
            placeholders = PLACEHOLDER.findall(rule.name)
            template = PLACEHOLDER.sub("{}", rule.name)
            axes = [placeholder.partition(".")[0] for placeholder in placeholders]
            for numbers in itertools.product(*(self._ranges[placeholder] for placeholder in placeholders)):
                yield template.format(*numbers), Match(rule, dict(zip(axes, numbers, strict=True)), self._shapes[rule])


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """A shape expression such as `A*(nope+rope)` over named sizes."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp):
            return int(OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
        raise ValueError(f"{expression!r} is not a shape expression")

    return walk(ast.parse(expression, mode="eval").body)


@cache
def load_manifests() -> Mapping[str, Manifest]:
    """All manifests of the package, by name."""
    files = [file for file in resources.files("kconvert.manifests").iterdir() if file.name.endswith(".toml")]
    manifests = [_parse(tomllib.loads(file.read_text("utf-8"))) for file in sorted(files, key=lambda file: file.name)]
    return {manifest.name: manifest for manifest in manifests}


def load_manifest(name: str) -> Manifest:
    """The manifest called `name`; KconvertError listing those there are when there is none."""
    manifests = load_manifests()
    if name not in manifests:
        raise KconvertError(f"there is no manifest {name!r}; there are {', '.join(sorted(manifests))}")
    return manifests[name]


def manifest_for(config: Mapping[str, Any]) -> Manifest:
    """The manifest of the model that config.json describes; the generic one when no other knows it."""
    for manifest in load_manifests().values():
        if config.get("model_type") in manifest.model_types:
            return manifest
    return load_manifest(GENERIC)


def _parse(table: Mapping[str, Any]) -> Manifest:
    linears = [Rule(entry["name"], entry["role"], tuple(entry["shape"])) for entry in table.get("weights", ())]
    tensors = [
        Rule(entry["name"], entry["role"], tuple(entry["shape"]), entry["dtype"]) for entry in table.get("tensors", ())
    ]
    return Manifest(
        name=table["name"],
        model_types=tuple(table.get("model_types", ())),
        accepts_any=table.get("open", False),
        dims=table.get("dims", {}),
        indices={name: (start, stop) for name, (start, stop) in table.get("indices", {}).items()},
        limits=table.get("limits", {}),
        rules=(*linears, *tensors),
        config=table.get("config", {}),
        side_files=table.get("side_files", {}),
        shard_name=table.get("shard_name", "model-{number:05d}-of-{total:05d}.safetensors"),
    )
