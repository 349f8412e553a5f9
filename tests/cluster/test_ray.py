"""Conversions by Ray: the bytes of one machine, whatever dies meanwhile."""

from __future__ import annotations

import threading
from typing import Any

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
