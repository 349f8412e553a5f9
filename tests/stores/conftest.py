"""A checkpoint in moto's S3, and obstore without its waits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from s3_server import Bucket, bucket

from kconvert import Recipe, convert, plan
from kconvert.stores import client

__all__ = ["bucket"]
PLACE, OUT = "s3://models/kimi/tiny", "s3://models/kimi/bf16"
SHARDS = ("--shard-size", "300kB")
Tree = Callable[[Path], "dict[str, bytes]"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.01,) * 5)
    pause = timedelta(milliseconds=1)
    monkeypatch.setitem(client.RETRIES, "backoff", {"init_backoff": pause, "max_backoff": 5 * pause, "base": 2})


@pytest.fixture
def stored(bucket: Bucket, int4: Path) -> str:
    """The address of `int4`'s files."""
    for path in int4.rglob("*"):
        if path.is_file() and ".kconvert" not in path.parts:
            bucket.put(f"models/kimi/tiny/{path.relative_to(int4)}", path.read_bytes())
    bucket.asked.clear()
    return PLACE


@pytest.fixture(scope="session")
def whole(int4: Path, tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> dict[str, bytes]:
    """What `arguments` would write into a directory."""
    root = tmp_path_factory.mktemp("stores") / "bf16"
    convert(plan(int4, Recipe("bf16", shard_size=300_000)), root)
    return tree(root)


@pytest.fixture
def arguments(bucket: Bucket, int4: Path) -> tuple[object, ...]:
    return ("int4-to-bf16", int4, OUT, *SHARDS)
