"""The files of a directory or of a repository as a list, before anything is known of what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kconvert.errors import KconvertError

INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = "model-{number:05d}-of-{total:05d}.safetensors"
CONFIG_NAME = "config.json"
STATE_DIR = ".kconvert"
RANKS = "ranks"  # in there, as long as ranks share what is being written


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size in bytes, and a stamp that changes when the content does."""

    nbytes: int
    stamp: str


@dataclass(frozen=True)
class Listing:
    """`files` by path relative to `root`, which names the whole in messages; `load` reads a small file."""

    root: Path
    files: Mapping[str, FileStat]
    load: Callable[[str], bytes]

    def json(self, name: str) -> dict[str, Any]:
        """The table in the JSON file `name`; KconvertError when it is none."""
        path, text = self.root / name, self.load(name)
        if not text.strip():
            raise KconvertError(f"{path} is not valid JSON, it is empty; fetch it again")
        try:
            table = json.loads(text)
            if b"\\u" in text:  # half of a surrogate pair is no character, and cannot be written again
                json.dumps(table, ensure_ascii=False).encode("utf-8")
        except json.JSONDecodeError as error:
            raise KconvertError(
                f"{path} is not valid JSON at line {error.lineno}, column {error.colno}; fetch it again"
            ) from None
        except (ValueError, RecursionError):
            raise KconvertError(f"{path} is not valid JSON; fetch it again") from None
        if not isinstance(table, dict):
            raise KconvertError(f"{path} is not a JSON object; fetch it again")
        return table

    @property
    def safetensors(self) -> list[str]:
        """In order of their names."""
        return sorted(file for file in self.files if file.endswith(".safetensors"))

    @property
    def top(self) -> list[str]:
        """The files that lie in no folder."""
        return [file for file in self.files if "/" not in file]


def what_finishes(root: Path) -> str | None:
    """What to do with a directory that a conversion has begun, where it is no checkpoint yet; None where none has."""
    if (root / STATE_DIR / RANKS).is_dir():
        return f"run `kconvert finalize {root}`, which closes it or names the ranks that are still to run"
    return "run the conversion again" if (root / STATE_DIR).is_dir() else None
