"""Conversions by Ray: the bytes of one machine, whatever dies meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from kconvert import convert

from .conftest import Job


def test_a_node_that_dies_in_the_middle_changes_no_byte(cluster: Any, job: Job) -> None:
    failures: list[BaseException] = []
    told: list[int] = []

    def run() -> None:
        try:
            job.run(cluster.address, 0.02, advance=told.append)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    job.wait_for(8, lambda: not thread.is_alive())
    assert thread.is_alive()
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    job.check_no_half_files()
    thread.join(120)

    assert not failures
    job.check_finished()
    assert sum(told) <= job.plan().output_bytes


def test_a_quiet_command_prints_nothing(cluster: Any, job: Job) -> None:
    words = ["int4-to-bf16", job.source, job.destination, "--engine", "ray", "--ray-address", cluster.address, "-q"]
    command = [sys.executable, "-c", "from kconvert.cli import main; main()", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_made_is_kept_when_a_file_of_the_source_was_replaced_by_a_sound_one(
    cluster: Any, job: Job, int4_copy: Path
) -> None:
    job.source = int4_copy
    convert(job.plan(), job.destination, worker="0/3")
    before = {path: path.stat().st_mtime_ns for path in job.destination.glob("*.safetensors")}
    min(int4_copy.glob("*.safetensors")).touch()

    job.run(cluster.address)

    job.check_finished()
    assert [path for path, mtime in before.items() if path.stat().st_mtime_ns == mtime]
