"""Workers on a machine whose memory lies at several nodes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from kconvert import Recipe, convert, plan
from kconvert.checkpoint import buffers


def machine(monkeypatch: pytest.MonkeyPatch, home: Path, *nodes: str, allowed: set[int]) -> list[set[int]]:
    """A machine of such nodes, of whose processors we may use some; where threads have settled comes into the list."""
    for number, cpus in enumerate(nodes):
        node = home / f"node{number}"
        node.mkdir()
        (node / "cpulist").write_text(cpus + "\n")
    settled: list[set[int]] = []
    monkeypatch.setattr(buffers, "NODES", home)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: settled.append(cpus))
    return settled


def test_workers_take_the_nodes_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = machine(monkeypatch, tmp_path, "0-1,4", "2-3", "", allowed={0, 1, 2, 3, 4})
    for worker in range(4):
        buffers.stay_on_a_node(worker)
    assert settled == [{0, 1, 4}, {2, 3}, {0, 1, 4}, {2, 3}]


@pytest.mark.parametrize(("nodes", "allowed"), [(["0-3"], {0, 1}), (["0-1", "2-3"], {2, 3}), ([], {0})])
def test_where_one_node_is_all_there_is_nobody_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[str], allowed: set[int]
) -> None:
    settled = machine(monkeypatch, tmp_path, *nodes, allowed=allowed)
    buffers.stay_on_a_node(1)
    assert not settled


def test_a_conversion_spreads_its_workers(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    settled = machine(monkeypatch, nodes, "0", "1", allowed={0, 1})
    convert(plan(int4, Recipe("bf16")), tmp_path / "bf16", threads=4)
    assert Counter(map(frozenset, settled)) == {frozenset({0}): 2, frozenset({1}): 2}
