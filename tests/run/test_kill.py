"""A run that is killed, interrupted or started twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kconvert import Recipe, convert, plan

if TYPE_CHECKING:
    from .conftest import Job


def wait_for_records(job: Job, process: subprocess.Popen[str], count: int) -> None:
    """Until the journal knows `count` shards, or the process has ended."""
    deadline = time.monotonic() + 60
    while job.records < count and process.poll() is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.001)


def count_shards(job: Job) -> int:
    return sum(name.endswith(".safetensors") for name in job.whole)


def kill_somewhere(job: Job, dice: random.Random) -> bool:
    """Start the job and kill it at a random moment; False when it had ended by then."""
    shards = count_shards(job)
    with job.start() as process:
        if dice.random() < 0.2:
            time.sleep(dice.uniform(0, 1))
        else:
            wait_for_records(job, process, min(job.records + dice.randint(1, shards // 4), shards))
            time.sleep(dice.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def kill_again_and_again(job: Job, kills: int, seed: int) -> int:
    """Kill runs of the job until `kills` have hit; returns how many hit work on the shards.

    A destination that has all its shards is finished, compared, and left for a new one.
    """
    dice = random.Random(seed)
    base = job.destination
    hits = in_the_middle = attempts = 0
    while hits < kills:
        attempts += 1
        assert attempts <= 3 * kills, "the runs end before they can be killed"
        if kill_somewhere(job, dice):
            hits += 1
            in_the_middle += 0 < job.records < count_shards(job)
            job.check_no_half_files()
        if job.records == count_shards(job):
            job.check_rerun_finishes()
            job.destination = base.with_name(f"{base.name}{attempts}")
    return in_the_middle


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_several_times_finishes_byte_identically_when_run_again(job: Job, seed: int) -> None:
    assert kill_again_and_again(job, 5, seed) >= 3

    job.check_rerun_finishes()


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_no_byte(job: Job) -> None:
    assert kill_again_and_again(job, 50, seed=50) >= 30

    job.check_rerun_finishes()


def test_a_rerun_after_a_kill_keeps_the_shards_that_were_finished(job: Job) -> None:
    with job.start() as process:
        wait_for_records(job, process, 5)
        process.send_signal(signal.SIGKILL)
    before = {name: (job.destination / name).stat().st_mtime_ns for name in job.shards}
    kept = job.records
    assert 5 <= kept < count_shards(job)

    job.check_rerun_finishes()

    unchanged = [name for name, mtime in before.items() if (job.destination / name).stat().st_mtime_ns == mtime]
    assert len(unchanged) >= kept


def test_ctrl_c_says_how_to_go_on_and_the_rerun_goes_on(job: Job) -> None:
    with job.start() as process:
        wait_for_records(job, process, 3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)

    assert process.returncode == 130
    assert said == "interrupted: run the same command again; a conversion goes on from here\n"
    job.check_no_half_files()
    assert "config.json" not in job.files
    assert job.state == {"journal.jsonl", "lock"}, "unfinished files keep the space they took"
    kept = job.records
    assert kept >= 3
    before = {name: (job.destination / name).stat().st_mtime_ns for name in job.shards}
    job.check_rerun_finishes()
    assert [name for name in before if (job.destination / name).stat().st_mtime_ns != before[name]] == []


def test_a_second_run_on_the_same_directory_refuses_and_the_first_finishes(job: Job) -> None:
    at_work, may_go_on = threading.Event(), threading.Event()

    def hold(nbytes: int) -> None:
        if nbytes:
            at_work.set()
            assert may_go_on.wait(60)

    work = plan(job.source, Recipe("bf16", "int4", shard_size=100_000))
    first = threading.Thread(target=convert, args=(work, job.destination), kwargs={"advance": hold, "threads": 2})
    first.start()
    try:
        assert at_work.wait(60)
        job.check_error(job.run(), "another kconvert is writing to", str(job.destination))
        job.check_error(job.run("--overwrite"), "another kconvert is writing to", str(job.destination))
    finally:
        may_go_on.set()
        first.join(60)

    job.check_finished()


def test_a_run_survives_that_another_finishes_a_shard_while_it_looks_at_the_disk(job: Job) -> None:
    """The first run renames its partial files at any time: a name that the second has just seen may be gone."""
    assert job.run().exit_code == 0
    (job.destination / ".kconvert" / "model-00001.part").symlink_to("gone")

    job.check_rerun_finishes()


def test_the_lock_goes_with_the_process_that_held_it(job: Job, tmp_path: Path) -> None:
    with job.start() as process:
        wait_for_records(job, process, 1)
        job.check_error(job.run(), "another kconvert is writing to")
        os.kill(process.pid, signal.SIGKILL)

    job.check_rerun_finishes()
