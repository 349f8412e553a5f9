"""What dies, doubles or differs in a cluster: the bytes of one machine at the end, or one sentence."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kconvert import KconvertError, convert
from kconvert.run.state.locks import Busy

from .conftest import Job

pytestmark = pytest.mark.slow


def workers(cluster: Any) -> list[int]:
    """The processes of this cluster that have a task, or wait for one."""
    raylets = {info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]}
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and path.read_bytes().startswith((b"ray::start", b"ray::IDLE")):
                found.append(int(path.parent.name))
    return found


def run_driver(driver: list[str], cluster: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([*driver, cluster.address], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(20))
def test_workers_killed_at_random_moments_change_no_byte(cluster: Any, job: Job, driver: list[str], seed: int) -> None:
    dice = random.Random(seed)
    with run_driver(driver, cluster) as process:
        for _ in range(3):
            job.wait_for(job.shards + dice.randint(1, 8), lambda: process.poll() is not None)
            time.sleep(dice.uniform(0, 0.3))
            if alive := workers(cluster):
                with suppress(ProcessLookupError):
                    os.kill(dice.choice(alive), signal.SIGKILL)
            job.check_no_half_files()
        _, said = process.communicate(timeout=200)

    assert process.returncode == 0, said
    job.check_finished()


@pytest.mark.parametrize("seed", range(3))
def test_a_driver_that_is_killed_goes_on_when_it_is_started_again(
    cluster: Any, job: Job, driver: list[str], seed: int
) -> None:
    dice = random.Random(seed)
    for _ in range(2):
        with run_driver(driver, cluster) as process:
            job.wait_for(job.shards + dice.randint(1, 12), lambda: process.poll() is not None)
            process.kill()
        job.check_no_half_files()

    job.run(cluster.address)

    job.check_finished()


def test_a_command_without_ray_goes_on_from_what_a_killed_driver_has_left(
    cluster: Any, job: Job, driver: list[str]
) -> None:
    with run_driver(driver, cluster) as process:
        job.wait_for(6, lambda: process.poll() is not None)
        process.kill()
    deadline = time.monotonic() + 60
    while True:
        try:
            convert(job.plan(), job.destination)
            break
        except Busy:  # its workers end with it, but not in the same moment
            assert time.monotonic() < deadline
            time.sleep(0.2)

    job.check_finished()


def test_two_drivers_on_one_directory(cluster: Any, job: Job, driver: list[str]) -> None:
    with run_driver(driver, cluster) as first:
        job.wait_for(2, lambda: first.poll() is not None)
        with pytest.raises(KconvertError, match="another kconvert is writing to"):
            job.run(cluster.address)
        with pytest.raises(KconvertError, match="another kconvert is writing to"):
            convert(job.plan(), job.destination)
        _, said = first.communicate(timeout=200)

    assert first.returncode == 0, said
    job.check_finished()


def test_a_node_with_another_version_of_kconvert(cluster: Any, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kconvert.cluster.ray.__version__", "9.9.9")

    with pytest.raises(KconvertError, match=r"has kconvert .*, and this is 9\.9\.9; install the same on all nodes"):
        job.run(cluster.address)

    assert not job.shards


def test_a_node_whose_clock_is_wrong(cluster: Any, job: Job) -> None:
    """Times of files are compared with nothing but what they were when the file was left."""
    job.run(cluster.address, clock=3600 * 24 * 400)

    job.check_finished()


def test_a_node_that_sees_another_source(cluster: Any, job: Job, int4_copy: Path) -> None:
    here = job.plan()
    job.source = int4_copy
    next(int4_copy.glob("*.safetensors")).touch()

    with pytest.raises(KconvertError, match="SRC must have the same files everywhere"):
        convert(replace(here, again=job.plan().again), job.destination, engine="ray", ray_address=cluster.address)

    assert not job.shards
