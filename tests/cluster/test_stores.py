"""Conversions by Ray into an object store, or of what comes from one: nothing is shared but the store."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3_server import Bucket, bucket, no_waiting

from kconvert import KconvertError, Plan, Recipe, convert, plan

from .conftest import Tree

__all__ = ["bucket", "no_waiting"]
SRC, OUT = "s3://models/kimi/tiny", "s3://models/kimi/bf16"
RECIPE = Recipe("bf16", shard_size=100_000)
VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "XDG_CACHE_HOME")


@pytest.fixture
def stored(bucket: Bucket, int4: Path) -> str:
    bucket.put_files(int4, "models/kimi/tiny")
    return SRC


def on_nodes(source: object, seconds: float = 0.0) -> Plan:
    """A plan of nodes that have their credentials, as these have begun before there was a server; held up at every write."""
    variables = {name: os.environ[name] for name in VARIABLES}

    def again() -> Plan:
        import os
        import time

        from kconvert import plan

        def slow(*arguments: Any) -> Any:
            time.sleep(seconds)
            return real(*arguments)

        os.environ.update(variables)
        real: Callable[..., Any] = os.pwrite
        os.pwrite = slow
        return plan(source, RECIPE)  # type: ignore[arg-type]

    return replace(plan(source, RECIPE), again=again)  # type: ignore[arg-type]


def shards(bucket: Bucket) -> int:
    return sum(name.endswith(".safetensors") for name in bucket.sent(OUT))


def test_a_node_that_dies_in_the_middle_changes_no_byte_in_a_store(
    cluster: Any, bucket: Bucket, int4: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            convert(on_nodes(int4, 0.02), OUT, engine="ray", ray_address=cluster.address)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    while shards(bucket) < 8 and thread.is_alive():
        thread.join(0.01)
    assert thread.is_alive(), failures
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    seen = bucket.files(OUT)
    assert all(content == whole[name] for name, content in seen.items())
    assert "config.json" not in seen
    thread.join(120)

    assert not failures
    assert bucket.files(OUT) == whole
    state = {name.split("/")[1] for name in bucket.files(OUT, hidden=True) if name.startswith(".kconvert/")}
    assert state == {"plan.json", "done"}


@pytest.mark.parametrize("place", [OUT, "directory"])
def test_what_comes_from_a_store_keeps_within_a_budget(
    cluster: Any, bucket: Bucket, stored: str, whole: dict[str, bytes], tmp_path: Path, tree: Tree, place: str
) -> None:
    out = OUT if place == OUT else tmp_path / "bf16"

    def run(budget: int) -> None:
        convert(on_nodes(stored), out, engine="ray", ray_address=cluster.address, disk_budget=budget)

    with pytest.raises(KconvertError, match="a disk budget of 10 kB is too small for this plan; the smallest that"):
        run(10_000)
    run(5_000_000)

    assert (bucket.files(OUT) if place == OUT else tree(tmp_path / "bf16")) == whole
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".part", ".incomplete")]
    assert not [path for path in left if path.parent != out]


def test_a_finished_place_needs_no_cluster_and_ranks_go_on_from_what_ray_has_begun(
    cluster: Any, bucket: Bucket, int4: Path, whole: dict[str, bytes]
) -> None:
    made = on_nodes(int4)
    convert(made, OUT, engine="ray", ray_address=cluster.address)
    convert(made, OUT, engine="ray", ray_address="127.0.0.1:1")
    bucket.remove(OUT, "config.json", min(name for name in whole if name.endswith(".safetensors")))
    convert(made, OUT, engine="ray", ray_address=cluster.address)

    assert bucket.files(OUT) == whole
