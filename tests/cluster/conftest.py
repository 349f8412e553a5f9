"""A cluster of Ray on this machine, and a conversion on it whose workers are slow enough to be found in the middle."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kconvert import Plan, Recipe, convert, plan

Tree = Callable[[Path], "dict[str, bytes]"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes with a CPU each, that of the head among them."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=small)
    try:
        for _ in range(2):
            nodes.add_node(**small)
        nodes.wait_for_nodes(60)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@dataclass
class Job:
    """A conversion of `source` to `destination`; `whole` is what an undisturbed run of one machine leaves there."""

    source: Path
    destination: Path
    whole: dict[str, bytes]
    tree: Tree

    def plan(self, seconds: float = 0.0, clock: float = 0.0) -> Plan:
        """Workers make it again, and are held up from then on at every write; their files are as late as their clock."""
        recipe = Recipe("bf16", shard_size=100_000)
        return replace(plan(self.source, recipe), again=held_up(self.source, recipe, seconds, clock))

    def run(self, address: str, seconds: float = 0.0, clock: float = 0.0, **options: Any) -> None:
        convert(self.plan(seconds, clock), self.destination, engine="ray", ray_address=address, **options)

    def check_finished(self) -> None:
        assert self.tree(self.destination) == self.whole
        assert sorted(os.listdir(self.destination / ".kconvert")) == ["journal.jsonl", "lock"]

    def check_no_half_files(self) -> None:
        """Whatever is visible is whole, and nothing says that there is more."""
        files = self.tree(self.destination)
        assert all(content == self.whole[name] for name, content in files.items())
        assert files.keys() == self.whole.keys() or "config.json" not in files

    @property
    def shards(self) -> int:
        return len([*self.destination.glob("*.safetensors")])

    def wait_for(self, shards: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Until so many are there."""
        deadline = time.monotonic() + 120
        while self.shards < shards and not is_over():
            assert time.monotonic() < deadline, "the cluster makes no progress"
            time.sleep(0.01)


def held_up(source: Path, recipe: Recipe, seconds: float, clock: float) -> Callable[[], Plan]:
    """A closure, which travels as code: the nodes do not have the tests."""

    def again() -> Plan:
        import os
        import time

        from kconvert import plan

        def slow(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                time.sleep(seconds)
                return function(*arguments)

            return call

        def rename(name: Any, target: Any) -> None:
            if clock:
                os.utime(name, (time.time() + clock,) * 2)
            real(name, target)

        real = os.rename
        os.pwrite, os.rename = slow(os.pwrite), slow(rename)
        return plan(source, recipe)

    return again


@pytest.fixture(scope="session")
def whole(int4: Path, tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed") / "bf16"
    convert(plan(int4, Recipe("bf16", shard_size=100_000)), root)
    return tree(root)


@pytest.fixture
def job(int4: Path, tmp_path: Path, whole: dict[str, bytes], tree: Tree) -> Job:
    return Job(int4, tmp_path / "bf16", whole, tree)


@pytest.fixture
def driver(job: Job) -> list[str]:
    """The same as a command of its own; the cluster's address follows."""
    return [sys.executable, "-c", DRIVER, str(Path(__file__)), str(job.source), str(job.destination)]


DRIVER = """
import importlib.util, sys
from pathlib import Path
from kconvert import KconvertError
spec = importlib.util.spec_from_file_location("held_up_jobs", sys.argv[1])
jobs = importlib.util.module_from_spec(spec)
sys.modules["held_up_jobs"] = jobs
spec.loader.exec_module(jobs)
try:
    jobs.Job(Path(sys.argv[2]), Path(sys.argv[3]), {}, dict).run(sys.argv[4], 0.02)
except KconvertError as error:
    sys.exit(f"error: {error}")
"""
