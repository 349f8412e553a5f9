"""Comparisons by Ray: the report of one machine, whatever dies meanwhile, and nothing that it would not have said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kconvert import KconvertError, Report, verify
from kconvert.checkpoint.source import open_directory
from kconvert.cli import main
from kconvert.proof import verify as proof


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, of checkpoints that are not worth a process."""
    monkeypatch.setattr("kconvert.proof.parity.shares.SHARE", 1)
    monkeypatch.setattr("kconvert.proof.parity.shares.ROUNDS", 2)


def plant(root: Path, *places: int) -> None:
    """Another bit in the first element of these of the experts' matrices."""
    tensors = [tensor for name, tensor in open_directory(root).tensors.items() if name.endswith("down_proj.weight")]
    for tensor in (tensors[place] for place in places):
        with (root / tensor.file).open("r+b") as file:
            file.seek(tensor.start)
            byte = file.read(1)[0]
            file.seek(tensor.start)
            file.write(bytes([byte ^ 1]))


def said(report: Report) -> tuple[Any, ...]:
    return report.faults, report.comparisons, report.spreads, report.worst, report.digests, report.reference


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)], catch_exceptions=False)


def test_a_cluster_finds_what_one_machine_finds_in_the_same_order(cluster: Any, int4: Path, bf16_copy: Path) -> None:
    plant(bf16_copy, -1, 0, 5)
    told: list[int] = []
    here = verify(int4, bf16_copy, keep_going=True, digest=True)

    there = verify(
        int4, bf16_copy, keep_going=True, digest=True, engine="ray", ray_address=cluster.address, advance=told.append
    )

    assert len(here.faults) == 3
    assert said(there) == said(here)
    assert sum(told) == there.output.checkpoint.nbytes


def test_the_command_names_the_first_fault_and_exits_as_without_ray(cluster: Any, int4: Path, bf16_copy: Path) -> None:
    options = ("--engine", "ray", "--ray-address", cluster.address)
    sound = run(int4, bf16_copy, *options)
    assert (sound.exit_code, sound.stdout) == (0, run(int4, bf16_copy).stdout)
    plant(bf16_copy, -1, 0)

    found = run(int4, bf16_copy, *options)

    assert found.exit_code == 1
    assert found.stderr == run(int4, bf16_copy).stderr


def held_up(real: Callable[..., Any]) -> Callable[..., Any]:
    """A closure, which travels as code: the nodes do not have the tests."""

    def again(*arguments: Any) -> Any:
        import time

        from kconvert.proof.parity.comparing import Job

        compare = Job.compare

        def slow(*arguments: Any) -> Any:
            time.sleep(0.05)
            return compare(*arguments)

        Job.compare = slow  # type: ignore[method-assign]
        return real(*arguments)

    return again


def test_a_node_that_dies_in_the_middle_changes_nothing_in_the_report(
    cluster: Any, int4: Path, bf16_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(bf16_copy, 0)
    here = verify(int4, bf16_copy, keep_going=True)
    monkeypatch.setattr(proof, "_again", held_up(proof._again))
    reports: list[Report] = []
    told: list[int] = []

    def compare() -> None:
        reports.append(
            verify(int4, bf16_copy, keep_going=True, engine="ray", ray_address=cluster.address, advance=told.append)
        )

    thread = threading.Thread(target=compare)
    thread.start()
    deadline = time.monotonic() + 120
    while not told and thread.is_alive():
        assert time.monotonic() < deadline, "the cluster makes no progress"
        time.sleep(0.01)
    assert thread.is_alive()
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    thread.join(120)

    assert [said(report) for report in reports] == [said(here)]
    assert sum(told) == here.output.checkpoint.nbytes


def test_an_address_without_ray_is_refused(int4: Path, bf16: Path) -> None:
    found = run(int4, bf16, "--ray-address", "127.0.0.1:6379")

    assert found.exit_code == 2
    assert found.stderr.endswith("--ray-address is for --engine ray; give both, or leave it out\n")


def test_a_cluster_that_is_not_there_is_refused(int4: Path, bf16: Path) -> None:
    with pytest.raises(KconvertError, match=r"there is no Ray cluster at 127\.0\.0\.1:1 "):
        verify(int4, bf16, engine="ray", ray_address="127.0.0.1:1")
