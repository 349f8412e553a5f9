"""How a place in an object store is written on a command line: `s3://bucket/prefix`, `gs://…`, `az://…`."""

from __future__ import annotations

import re
from dataclasses import dataclass

PATTERN = re.compile(r"(s3|gs|az)://([^/\s]+)((?:/[^/\s]+)*)/?")


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


def parse_store_url(text: str) -> StoreUrl | None:
    """None for what names no object store."""
    match = PATTERN.fullmatch(text)
    return StoreUrl(match[1], match[2], match[3].strip("/")) if match else None
