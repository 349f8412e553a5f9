"""compressed-tensors, loaded in a tenth of the time where a process does nothing else but compare.

It imports transformers for its annotations and for loading models, none of which decodes a value. In a process that ends with
the comparison (see `apart`) placeholders stand in for it; should compressed-tensors not load with these, it is loaded with
transformers. What decodes is compressed-tensors' own code either way.
"""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME, SPARED = "compressed_tensors", "transformers"


def part(module: str, name: str) -> Any:
    """What compressed-tensors has under this name in `module`, without its own name before it."""
    load()
    return getattr(import_module(f"{NAME}.{module}"), name)


@cache
def load() -> None:
    """Import compressed-tensors, unless it is there."""
    if _finder in sys.meta_path:
        try:
            import_module(NAME)
        except Exception:  # whatever a release does with the names that it imports
            sys.meta_path.remove(_finder)
            for name in [name for name in sys.modules if name.partition(".")[0] in (NAME, SPARED)]:
                del sys.modules[name]
        else:
            return
    import_module(NAME)


def is_loaded() -> bool:
    return NAME in sys.modules


def apart() -> None:
    """Say that this process ends with the comparison, so that nobody else will ask it for transformers."""
    if not {NAME, SPARED} & sys.modules.keys():
        sys.meta_path.insert(0, _finder)


class _Placeholder(ModuleType):
    """Has a class of any name that is asked for."""

    __path__: MutableSequence[str] = []  # noqa: RUF012  as a package has it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_spared = fullname.partition(".")[0] == SPARED
        return ModuleSpec(fullname, self, is_package=True) if is_spared else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_finder = _Finder()
