"""The digests by which the Hub knows a file's content: sha256 of large files, git's sha1 of small ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from kconvert.checkpoint.listing import FileStat

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

CHUNK = 1 << 20


def new_digest(stat: FileStat) -> Hash:
    """To be fed with the file's bytes; see `says`."""
    if stat.stamp.startswith("sha256:"):
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % stat.nbytes, usedforsecurity=False)


def says(digest: Hash, stat: FileStat) -> bool:
    return digest.hexdigest() == stat.stamp.partition(":")[2]


def feed(digest: Hash, path: Path) -> None:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)


def matches(path: Path, stat: FileStat) -> bool:
    digest = new_digest(stat)
    feed(digest, path)
    return says(digest, stat)
