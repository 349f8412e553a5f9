"""Values of a config.json, which anybody may have written: each is what it should be, or a sentence names its key."""

from __future__ import annotations

import fnmatch
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kconvert.errors import KconvertError

FILE = "config.json"
PATTERN = "re:"  # before what is an expression and no name
SCALE_FORMAT, UE8M0 = "scale_fmt", "ue8m0"
# What multimodal checkpoints keep the language model below, and that its modules; engines know them with and without.
LANGUAGE_MODEL = "language_model."
WRAPPERS = (LANGUAGE_MODEL, "model.")
MOST = 1 << 62  # no size of a model is larger; a file may claim any
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80


def brief(value: Any) -> str:
    """A value as a sentence can bear it, however long or deep it is."""
    return _brief.repr(value)


def key_path(path: str, key: str) -> str:
    """The path of `key` in the table at `path`."""
    if re.fullmatch(r"[\w-]{1,80}", key, re.ASCII):
        return f"{path}.{key}" if path else key
    return f"{path}[{brief(key)}]"


@dataclass(frozen=True, slots=True)
class Table:
    """A JSON object of config.json, or of the `file` that declares in its place, and the path of keys that leads to it.

    `config` is the whole of config.json, whose other keys may say more.
    """

    path: str
    values: Mapping[str, Any]
    file: str = FILE
    config: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    @property
    def place(self) -> str:
        """How sentences about it begin."""
        return f"{self.file}: {self.path}" if self.path else self.file

    def fault(self, key: str, wanted: str) -> KconvertError:
        """The sentence for a value that is not `wanted`."""
        have = f"is {brief(self.values[key])}" if key in self.values else "is missing"
        return KconvertError(f"{self.place_of(key)} {have}; {wanted} belongs there")

    def place_of(self, key: str) -> str:
        """`place` of the value at `key`."""
        return f"{self.file}: {key_path(self.path, key)}"

    def table(self, key: str) -> Table:
        """The table at `key`, which must be there."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.fault(key, "a table")
        return replace(self, path=key_path(self.path, key), values=value)

    def table_if_any(self, key: str) -> Table:
        """The table at `key`, one without entries where there is none."""
        return self.table(key) if self.values.get(key) else replace(self, path=key_path(self.path, key), values={})

    def tables(self, key: str) -> Iterator[Table]:
        """The tables of the list at `key`."""
        values = self.values.get(key)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.fault(key, "a list of tables")
        for number, value in enumerate(values):
            yield replace(self, path=f"{key_path(self.path, key)}[{number}]", values=value)

    def text(self, key: str, default: str) -> str:
        """The string at `key`; null counts as missing."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fault(key, "a name")
        return value

    def integer(self, key: str) -> int | None:
        """The whole number at `key`, which some tools write as 128.0 or "128"."""
        value = self.values.get(key)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and type(value) is not int:
            raise self.fault(key, "a whole number")
        if value is not None and abs(value) >= MOST:
            raise self.fault(key, "a number of fewer digits")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The truth value at `key`."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """The names and patterns at `key`, a list of them or one alone; none when it is missing."""
        value = self.values.get(key)
        names = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.fault(key, "a list of names")
        for name in names:
            if name.startswith(PATTERN):
                check_expression(self.place_of(key), name.removeprefix(PATTERN), name)
        return tuple(names)

    def globs(self, key: str) -> tuple[str, ...]:
        """`names`, of which those that are patterns of the shell have become one regular expression.

        A language model inside a larger one is meant with and without what it is called there, see bare_name.
        """
        named: dict[bool, list[str]] = {False: [], True: []}
        for name in self.names(key):
            named[_is_glob(name)].append(self.target(name))
        one = "|".join(pattern.removeprefix(PATTERN) for pattern in named[True])
        return (*named[False], PATTERN + one) if one else tuple(named[False])

    def target(self, name: str) -> str:
        """What `names` would have for a module, a pattern of the shell for several, or an expression after `re:`."""
        target = PATTERN + fnmatch.translate(bare_name(name)) if _is_glob(name) else bare_name(name)
        if target.startswith(PATTERN):
            check_expression(self.place_of(name), target.removeprefix(PATTERN), name)
        return target

    def block(self, key: str) -> tuple[int, int] | None:
        """Rows and columns of a block; old files of compressed-tensors write "128x128"."""
        value = self.values.get(key)
        if value is None:
            return None
        sizes = value
        if isinstance(value, str):
            sizes = [int(size) for size in value.split("x")] if re.fullmatch("[0-9]{1,9}x[0-9]{1,9}", value) else []
        if (
            not isinstance(sizes, list)
            or len(sizes) != 2
            or not all(type(size) is int and 0 < size < MOST for size in sizes)
        ):
            raise self.fault(key, "a pair of positive numbers, rows and columns,")
        return sizes[0], sizes[1]


def bare_name(name: str) -> str:
    """A module's name without what the models around it are called."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _is_glob(name: str) -> bool:
    return not name.startswith(PATTERN) and any(sign in name for sign in "*?[")


def check_expression(place: str, expression: str, written: str) -> None:
    """KconvertError where a name cannot be looked for by the expression; `written` is what the file has for it at `place`."""
    try:
        re.compile(expression)
    except (re.error, ValueError, OverflowError, RecursionError):
        raise KconvertError(f"{place} has {brief(written)}, which is no regular expression; mend it there") from None


def powers_of_two(table: Table) -> bool:
    """Whether scales are said to be powers of two, which those of activations are to be as well, then."""
    return table.text(SCALE_FORMAT, "").lower() == UE8M0
