"""Work spread over forks of a process comes back in order, and so do its errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kconvert import verify
from kconvert.errors import CheckFailed, KconvertError
from kconvert.proof import processes
from kconvert.proof.processes import SHARE, Crew, one_ahead, worthwhile


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any work is worth two processes."""
    monkeypatch.setattr(processes, "SHARE", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: [0])
    monkeypatch.setattr(processes, "WAITING", 1)


@dataclass
class Job:
    """One whose tasks are said by the test."""

    work: Callable[[int], Any]


def each(work: Callable[[int], Any], count: int, processes: int = 2) -> Iterator[Any]:
    """work(0) to work(count - 1)."""
    with Crew(processes, Job(work)) as crew:
        yield from crew.each("work", count)


def test_little_is_done_here_and_not_before_it_is_asked_for() -> None:
    done: list[int] = []
    assert worthwhile(2 * SHARE - 1) == 0
    found = each(done.append, 100, 0)
    next(found)
    assert done == [0]
    assert set(each(lambda number: os.getpid(), 100, 0)) == {os.getpid()}


@pytest.mark.usefixtures("shared")
def test_much_is_worth_as_many_processes_as_there_are_cores_and_some_more() -> None:
    assert worthwhile(2 * SHARE) == 2


def test_much_is_done_by_others_and_comes_back_in_order() -> None:
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.001 * (number % 3))
        return number, os.getpid()

    numbers, workers = zip(*each(work, 50), strict=True)
    assert numbers == tuple(range(50))
    assert len(set(workers) - {os.getpid()}) == 2


def test_an_error_is_raised_here_and_ends_the_work(tmp_path: Path) -> None:
    def work(number: int) -> int:
        if number == 5:
            raise CheckFailed("the fifth")
        (tmp_path / str(number)).touch()
        time.sleep(0.001)
        return number

    found = each(work, 10_000)
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(CheckFailed, match="the fifth"):
        next(found)
    assert len(list(tmp_path.iterdir())) < 1100


def test_a_killed_process_is_one_sentence() -> None:
    def work(number: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(KconvertError, match="killed, probably for want of memory"):
        list(each(work, 10))


def test_forks_end_with_their_parent(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
from kconvert.proof import processes
class Job:
    def work(self, number):
        Path({str(tmp_path)!r}, str(os.getpid())).touch()
        time.sleep(60)
list(processes.Crew(2, Job()).each("work", 100))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("thorough", [False, True])
def test_a_report_is_the_same_from_several_processes(
    int4: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch, thorough: bool
) -> None:
    compared: list[int] = []
    several = verify(int4, fp8, thorough=thorough, advance=compared.append)
    assert sum(compared) == sum(tensor.nbytes for tensor in several.output.checkpoint.tensors.values())
    monkeypatch.setattr(processes, "SHARE", SHARE)
    alone = verify(int4, fp8, thorough=thorough)
    assert several.comparisons == alone.comparisons
    assert several.spreads == alone.spreads


@pytest.mark.usefixtures("shared")
def test_a_fault_is_found_by_several_processes(int4: Path, bf16_copy: Path, raw: Any) -> None:
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    checkpoint = raw.load(bf16_copy)
    checkpoint[name].data = checkpoint[name].data[:-1] + bytes([checkpoint[name].data[-1] ^ 1])
    checkpoint.save()
    with pytest.raises(CheckFailed, match=rf"{name}' differs at \[127, 255\]"):
        verify(int4, bf16_copy)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_what_comes_one_ahead_comes_in_order_and_no_sooner(count: int) -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return number

    for number in (found := one_ahead(work, count)):
        time.sleep(0.01)
        assert begun[number:] in ([number], [number, number + 1])  # the room of what is looked at stays as it is
    assert begun == list(range(count))
    assert next(found, None) is None


def test_what_comes_one_ahead_has_ended_when_nobody_looks_any_more() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.05 * number)
        done.append(number)

    found = one_ahead(work, 3)
    next(found)
    found.close()
    assert done == [0, 1]


def test_a_fault_of_what_comes_one_ahead_comes_in_its_turn() -> None:
    found = one_ahead(lambda number: 1 // (1 - number), 3)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)
