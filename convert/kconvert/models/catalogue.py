"""The manifests there are: reads the TOML files of `kconvert.manifests` and finds the one that describes a model."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from kconvert.checkpoint.listing import SHARD_NAME
from kconvert.errors import KconvertError
from kconvert.models.indices import Index
from kconvert.models.manifest import Manifest, quant_method
from kconvert.models.rules import Rule, StackRule, respell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GENERIC = "generic"
MERGED_TABLES = ("dims", "defaults", "indices", "limits", "divisors", "also", "spelling", "serving", "side_files")
RULES = ("weights", "tensors")
MERGED_LISTS = (*RULES, "stacks")


@cache
def load_manifests() -> Mapping[str, Manifest]:
    """All manifests of the package, by name; one that others are based on comes before them."""
    files = [file for file in (resources.files("kconvert") / "manifests").iterdir() if file.name.endswith(".toml")]
    tables = {table["name"]: table for table in (tomllib.loads(file.read_text("utf-8")) for file in files)}
    for table in tables.values():
        _spread(table)
    whole: dict[str, dict[str, Any]] = {}
    for name in sorted(tables):
        _inherit(name, tables, whole)
    return {name: parse(table) for name, table in whole.items()}


def load_manifest(name: str) -> Manifest:
    """The manifest called `name`; KconvertError listing those there are when there is none."""
    manifests = load_manifests()
    if name not in manifests:
        raise KconvertError(f"there is no manifest {name!r}; there are {', '.join(sorted(manifests))}")
    return manifests[name]


def manifest_for(config: Mapping[str, Any], tensors: Collection[str] = ()) -> Manifest:
    """The manifest of the model that config.json describes; the generic one when no other knows it.

    Models of one architecture have one model_type; the one that is published in the same quantisation is taken, else the
    first. They differ in nothing but the name and what a sample is like. `tensors` are the names of the checkpoint's, which
    may be called in other words.
    """
    manifests = load_manifests().values()
    candidates = [manifest for manifest in manifests if config.get("model_type") in manifest.model_types]
    alike = [manifest for manifest in candidates if quant_method(manifest.config) == quant_method(config)]
    return (alike or candidates or [load_manifest(GENERIC)])[0].respelt(tensors)


def _spread(table: dict[str, Any]) -> None:
    """An entry with a list of names is one for each of them."""
    for key in RULES:
        entries = table.get(key, [])
        names = [entry["name"] if isinstance(entry["name"], list) else [entry["name"]] for entry in entries]
        table[key] = [{**entry, "name": name} for entry, spread in zip(entries, names, strict=True) for name in spread]


def _inherit(name: str, tables: Mapping[str, dict[str, Any]], whole: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table `name` with everything of its base that it does not override; puts both into `whole`, the base first."""
    if name in whole:
        return whole[name]
    table = tables[name]
    if "base" in table:
        base = copy.deepcopy(_inherit(table["base"], tables, whole))
        if table.get("own_config"):
            base |= {"config": {}, "side_files": {}}
        lacks = frozenset(table.get("lacks", ()))
        base |= {key: [rule for rule in base.get(key, ()) if rule["name"] not in lacks] for key in RULES}
        _wrap(base, table)
        merged = {key: {**base.get(key, {}), **table.get(key, {})} for key in MERGED_TABLES}
        merged["config"] = _merge_config(base.get("config", {}), table.get("config", {}))
        lists = {key: [*base.get(key, ()), *table.get(key, ())] for key in MERGED_LISTS}
        rules = {key: list({rule["name"]: rule for rule in entries}.values()) for key, entries in lists.items()}
        table = {**base, **table, **merged, **rules}
    whole[name] = table
    return table


def _wrap(base: dict[str, Any], table: dict[str, Any]) -> None:
    """Let `base` be the part of a larger model that `table` calls `prefix` and keeps the config.json of at `config_key`."""
    prefixes = {**table.get("renamed", {}), "": table.get("prefix", "")}
    for entry in itertools.chain(*(base.get(key, ()) for key in MERGED_LISTS)):
        entry["name"] = respell(entry["name"], prefixes)
        if "of" in entry:
            entry["of"] = [respell(name, prefixes) for name in entry["of"]]
    if key := table.get("config_key"):
        table["config"][key] = _merge_config(base.pop("config"), table["config"].get(key, {}))


def _merge_config(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `own` winning and coming first: a config.json lists its keys in its publisher's order."""
    return {**own, **{key: value for key, value in base.items() if key not in own}}


def parse(table: Mapping[str, Any]) -> Manifest:
    """The manifest that a TOML file with this table is, its base merged into it."""
    return Manifest(
        name=table["name"],
        model_types=tuple(table.get("model_types", ())),
        accepts_any=table.get("open", False),
        config_key=table.get("config_key"),
        prefix=table.get("prefix", ""),
        plain_prefixes=tuple(table.get("plain_prefixes", ())),
        stacked_method=table.get("stacked_method"),
        optional_layers=table.get("optional_layers"),
        dims=table.get("dims", {}),
        defaults=table.get("defaults", {}),
        indices={name: Index(**{**index, "range": tuple(index.get("range", ()))}) for name, index in _indices(table)},
        limits=table.get("limits", {}),
        divisors=table.get("divisors", {}),
        small=table.get("small", {}),
        per_layer=tuple(table.get("per_layer", ())),
        rules=tuple(_rule(entry) for key in RULES for entry in table.get(key, ())),
        stacks=tuple(StackRule(**{**entry, "of": tuple(entry["of"])}) for entry in table.get("stacks", ())),
        also=table.get("also", {}),
        spelling=table.get("spelling", {}),
        serving=table.get("serving", {}),
        config=table.get("config", {}),
        side_files=table.get("side_files", {}),
        shard_name=table.get("shard_name", SHARD_NAME),
    )


def _rule(entry: Mapping[str, Any]) -> Rule:
    lists = {key: tuple(entry[key]) for key in ("shape", "block") if key in entry}
    return Rule(**{**entry, **lists})


def _indices(table: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """An index is a table; a list stands for its `range`."""
    for name, index in table.get("indices", {}).items():
        yield name, {"range": index} if isinstance(index, list) else index
