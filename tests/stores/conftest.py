"""A checkpoint in moto's S3, and obstore without its waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import Bucket, bucket, no_waiting

from kconvert import Recipe, convert, plan

__all__ = ["bucket", "no_waiting"]
PLACE, OUT = "s3://models/kimi/tiny", "s3://models/kimi/bf16"
SHARD = 600_000
SHARDS = ("--shard-size", SHARD)
Tree = Callable[[Path], "dict[str, bytes]"]


@pytest.fixture
def stored(bucket: Bucket, int4: Path) -> str:
    """The address of `int4`'s files."""
    bucket.put_files(int4, "models/kimi/tiny")
    bucket.asked.clear()
    return PLACE


@pytest.fixture(scope="session")
def whole(int4: Path, tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> dict[str, bytes]:
    """What `arguments` would write into a directory."""
    root = tmp_path_factory.mktemp("stores") / "bf16"
    convert(plan(int4, Recipe("bf16", shard_size=SHARD)), root)
    return tree(root)


@pytest.fixture
def arguments(bucket: Bucket, int4: Path) -> tuple[object, ...]:
    return ("int4-to-bf16", int4, OUT, *SHARDS)
