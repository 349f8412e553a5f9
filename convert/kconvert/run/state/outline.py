"""What ranks agree on, in DST/.kconvert/ranks: the plan that they share, and how many they are. Each has a folder beside it.

The outline is written by whoever comes first, and by a link, which fails where the name is there already: so there is one,
and it is whole. It says all that closing DST takes but for the small files' content, which rank 0 leaves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from kconvert.checkpoint.files import sync_directory
from kconvert.checkpoint.listing import RANKS
from kconvert.errors import KconvertError, explain_os_error
from kconvert.planning.plan import Plan
from kconvert.run.state.ranks import MOST

OUTLINE = "plan.json"
CLOSING = "closing"  # the small files, in the folder of rank 0


@dataclass(frozen=True)
class Outline:
    """`head` is that of a journal of the plan; `small` are the names of side files and texts, config.json and index last."""

    head: Mapping[str, Any]
    ranks: int
    shards: tuple[tuple[str, int, int, str], ...]  # name, bytes, those of its header and their SHA-256
    small: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan, head: Mapping[str, Any], ranks: int) -> Outline:
        shards = [(s.name, s.nbytes, len(s.header), hashlib.sha256(s.header).hexdigest()) for s in plan.shards]
        return cls(head, ranks, tuple(shards), (*plan.side_files, *plan.texts))

    @classmethod
    def read(cls, state: Path) -> Outline | None:
        """That of DST/.kconvert; None where no ranks are at work or have been. KconvertError when it is none of ours."""
        path = state / RANKS / OUTLINE
        try:
            look = path.stat()
            outline = _read(path, look.st_ino, look.st_size, look.st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain_os_error(error, f"cannot read {path}") from None
        if outline is None:
            raise KconvertError(f"{path} is not what kconvert wrote; start again in another directory")
        return outline

    @classmethod
    def parse(cls, text: bytes) -> Outline | None:
        """From the content of its file; None of what is no outline."""
        try:
            table = json.loads(text)
            shards = tuple((str(name), int(a), int(b), str(digest)) for name, a, b, digest in table["shards"])
            outline = cls(dict(table["head"]), int(table["ranks"]), shards, tuple(map(str, table["small"])))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return outline if outline.is_sound else None

    @property
    def text(self) -> str:
        """The content of the file."""
        return json.dumps({"head": self.head, "ranks": self.ranks, "shards": self.shards, "small": self.small})

    @property
    def is_sound(self) -> bool:
        """Whether what a file says can be: nothing in it may lead out of DST, or be larger than there is."""
        names = [*(name for name, *_ in self.shards), *self.small]
        sizes = all(0 <= header <= nbytes for _, nbytes, header, _ in self.shards)
        return 0 < self.ranks <= MOST and sizes and all(map(_is_inside, names))

    def put(self, state: Path, token: str) -> Outline:
        """Into DST/.kconvert, unless there is one by now; returns that which is there. `token` is no other process's."""
        path = state / RANKS / OUTLINE
        partial = path.with_name(f"{OUTLINE}.{token}")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(partial, "w", encoding="utf-8") as file:
                file.write(self.text)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(partial, path)
            partial.unlink()
            sync_directory(path.parent)
        except OSError as error:
            raise explain_os_error(error, f"cannot write {path}") from None
        return Outline.read(state) or self

    def is_closable(self, state: Path) -> bool:
        """Whether rank 0 has left the small files."""
        return all((closing(state) / name).is_file() for name in self.small)


@lru_cache(1)
def _read(path: Path, *look: int) -> Outline | None:
    """A process that is one rank after the other reads it once."""
    return Outline.parse(path.read_bytes())


def folder(state: Path, rank: int) -> Path:
    """What is one rank's own, in DST/.kconvert: its lock, its journal, its unfinished files."""
    return state / RANKS / str(rank)


def closing(state: Path) -> Path:
    """Where rank 0 leaves the small files."""
    return folder(state, 0) / CLOSING


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
