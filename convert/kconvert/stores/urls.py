"""How a place in an object store is written on a command line: `s3://bucket/prefix`, `gs://…`, `az://…`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from kconvert.errors import KconvertError

PATTERN = re.compile(r"(s3|gs|az)://([^/\s]+)((?:/[^/\s]+)*)/?")
BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]*")  # what is none may be a key and its secret
MEANT = re.compile(r"[?#%\\]|(^|/)\.{1,2}(/|$)")  # in a prefix, what a URL would read as something else


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """The objects below `prefix`, which has no slash at either end, of a bucket (in Azure: a container)."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.prefix}".rstrip("/")

    def overlaps(self, other: StoreUrl) -> bool:
        """Whether one of the two lies in the other."""
        mine, theirs = (f"{place}/" for place in (self, other))
        return mine.startswith(theirs) or theirs.startswith(mine)


def parse_store_url(text: str) -> StoreUrl | None:
    """None for what names no object store; KconvertError for an address that a store would not understand as it looks."""
    match = PATTERN.fullmatch(text)
    if match is None:
        return None
    scheme, bucket, prefix = match[1], match[2], match[3].strip("/")
    if not BUCKET.fullmatch(bucket) or MEANT.search(prefix):
        raise KconvertError(
            f"the address {scheme}://… has more in it than a bucket and a prefix; write {scheme}://BUCKET/PREFIX without "
            "credentials, ?, #, % and dots for a name"
        )
    return StoreUrl(scheme, bucket, prefix)


def cache_directory() -> Path:
    """Where this machine keeps small files of stores, and what is on its way to one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kconvert"
