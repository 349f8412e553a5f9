"""The digests by which the Hub knows a file's content: sha256 of large files, git's sha1 of small ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kconvert.checkpoint.download import feed
from kconvert.checkpoint.listing import FileStat


class ContentDigest:
    """Of a file that the Hub lists with this stamp, to be fed with its bytes."""

    def __init__(self, stat: FileStat) -> None:
        self._wanted = stat.stamp.partition(":")[2]
        if stat.stamp.startswith("sha256:"):
            self._digest = hashlib.sha256()
        else:
            self._digest = hashlib.sha1(b"blob %d\0" % stat.nbytes, usedforsecurity=False)

    def update(self, data: bytes | memoryview, /) -> None:
        self._digest.update(data)

    def agrees(self) -> bool:
        return self._digest.hexdigest() == self._wanted


def matches(path: Path, stat: FileStat) -> bool:
    digest = ContentDigest(stat)
    feed(digest.update, path)
    return digest.agrees()
