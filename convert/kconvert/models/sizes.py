"""Sizes in a config.json: values at keys that lead into tables and lists, and arithmetic over them."""

from __future__ import annotations

import ast
import operator
from collections import ChainMap
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

LENGTH = "length"
# Other keys by which configs say a size, too, as transformers renames it.
SAME = {"experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value at `key`, which may lead into tables (`a.b`) and lists (`a.0`, `a.length`); None when there is none."""
    value: Any = config
    for step in key.split("."):
        value = _entry(value, step)
    return value


def _entry(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(step)
    if not isinstance(value, list):
        return None
    if step == LENGTH:
        return len(value)
    return value[int(step)] if step.isdecimal() and int(step) < len(value) else None


def assign(config: ChainMap[str, Any], key: str, value: Any) -> None:
    """Set the value that `lookup` finds at `key`, or a new one in the first table; a length that is set cuts the list."""
    *path, last = key.split(".")
    table: Any = next((table for table in config.maps if key.partition(".")[0] in table), config.maps[0])
    for step in path:
        table = table[step]
    if isinstance(table, list):
        del table[value:]
    else:
        table[last] = value


def restate(config: ChainMap[str, Any], key: str, others: Iterable[str], value: int) -> None:
    """Set the number that `key` has wherever else it is: in the other tables, and under these `others`."""
    before = lookup(config, key)
    for table in config.maps:
        for name in table.keys() & {key, *others}:
            if type(table[name]) is int and (name != key or table[name] == before):
                table[name] = value


def limited(have: Any, most: int) -> Any:
    """A number no larger than `most`, or a list of such numbers."""
    if isinstance(have, list):
        return [limited(number, most) for number in have]
    return min(have, most) if type(have) is int else have


def divisor(whole: int, most: int) -> int:
    """The largest number up to `most` that divides `whole`; `most` itself where there is nothing to divide."""
    return next((number for number in range(most, 0, -1) if whole % number == 0), most)


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """A shape expression such as `A*(nope+rope)` over named sizes; KeyError for a name that is not among them."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp):
            return int(OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
        raise ValueError(f"{expression!r} is not a shape expression")

    return walk(_parsed(expression))


@cache  # manifests have some hundred, which are asked for again and again
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body
