"""What held a run up, and the file that shows it."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kconvert import KconvertError, Recipe, convert, plan
from kconvert.checkpoint.source import Reader
from kconvert.run import engine
from kconvert.run.arrivals import Arrivals
from kconvert.run.departures import Departures
from kconvert.run.trace import Trace
from kconvert.run.writer import ShardWriter

from .conftest import run_command

DELAY = 0.02  # seconds: what it slows down takes longer than all else of a small checkpoint


def throttled(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    swift = getattr(owner, name)

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(DELAY)
        return swift(self, *arguments)

    monkeypatch.setattr(owner, name, slow)


def bound_of(source: Path, destination: Path) -> str | None:
    watch = Trace()
    convert(plan(source, Recipe("bf16")), destination, trace=watch)
    return watch.bound


@pytest.mark.parametrize(
    ("owner", "name", "bound"), [(Reader, "fetch", "disk read"), (ShardWriter, "write", "disk write")]
)
def test_a_slow_disk_is_what_bounds_a_run(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, bound: str
) -> None:
    throttled(monkeypatch, owner, name)
    assert bound_of(int4, tmp_path / "bf16") == bound


def test_a_slow_line_is_what_bounds_a_run(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arrivals, "is_here", lambda self, file: False)
    monkeypatch.setattr(Arrivals, "await_file", lambda self, file: time.sleep(DELAY))
    assert bound_of(int4, tmp_path / "bf16") == "line"


def test_a_line_that_takes_longer_to_send_than_all_else_is_what_bounds_a_run(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Departures, "complete", lambda self: time.sleep(20 * DELAY))
    drawn = tmp_path / "trace.json"
    watch = Trace(drawn)
    convert(plan(int4, Recipe("bf16")), tmp_path / "bf16", trace=watch, threads=2)
    assert watch.bound == "line"
    long = [event for event in json.loads(drawn.read_text()) if event and event["dur"] > 10 * DELAY * 1e6]
    assert sorted((event["name"], event["tid"]) for event in long) == [("wait", 0), ("wait", 1)]


def test_few_workers_that_compute_all_the_time_wait_for_no_disk(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift = engine.decode_straight

    def slow(*arguments: Any) -> None:
        time.sleep(4 * DELAY)  # far longer than a busy machine takes to write
        swift(*arguments)

    monkeypatch.setattr(engine, "decode_straight", slow)
    monkeypatch.setattr("kconvert.run.trace.os.sched_getaffinity", lambda pid: set(range(64)))
    assert bound_of(int4, tmp_path / "bf16") == "cores"


def test_a_run_that_finds_all_done_was_bound_by_nothing(int4: Path, tmp_path: Path) -> None:
    assert bound_of(int4, tmp_path / "bf16") is not None
    assert bound_of(int4, tmp_path / "bf16") is None


def test_a_rank_says_what_bounded_it(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throttled(monkeypatch, ShardWriter, "write")
    assert "GB/s), bound by disk write" in run_command("int4-to-bf16", int4, tmp_path / "a", "--worker", "0/1").output
    facts = json.loads(run_command("int4-to-bf16", int4, tmp_path / "b", "--worker", "0/1", "--json").output)
    assert facts["bound_by"] == "disk write"


def test_cores_that_are_busy_all_the_time_are_what_bounds_a_run(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throttled(monkeypatch, ShardWriter, "write")  # which matters less
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda pid: {0})
    spent = iter((0.0, 1e6))
    monkeypatch.setattr("kconvert.run.trace.time.process_time", lambda: next(spent))
    assert bound_of(int4, tmp_path / "bf16") == "cores"


def test_the_closing_line_says_what_bounded_the_run(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throttled(monkeypatch, ShardWriter, "write")
    assert "bound by disk write" in run_command("int4-to-bf16", int4, tmp_path / "bf16").output
    facts = json.loads(run_command("int4-to-bf16", int4, tmp_path / "again", "--json").output)
    assert facts["bound_by"] == "disk write"


def test_the_trace_is_of_every_worker_and_byte(int4: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "trace.json"
    assert run_command("int4-to-fp8", int4, tmp_path / "fp8", "--threads", 3, "--trace", drawn).exit_code == 0
    events = [event for event in json.loads(drawn.read_text()) if event]
    assert {event["name"] for event in events} >= {"read", "decode", "encode", "write"}
    assert {event["ph"] for event in events} == {"X"}
    assert {event["tid"] for event in events} <= {0, 1, 2}
    assert all(event["ts"] >= 0 and event["dur"] >= 0 and event["args"]["of"] for event in events)
    for worker in range(3):  # one thing at a time
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["tid"] == worker)
        assert all(end <= begin + 0.01 for (_, end), (begin, _) in pairwise(spans))


def test_a_trace_that_cannot_be_written_is_refused_before_the_first_shard(int4: Path, tmp_path: Path) -> None:
    result = run_command("int4-to-bf16", int4, tmp_path / "bf16", "--trace", tmp_path / "none" / "trace.json")
    assert result.exit_code == 2
    assert "cannot write" in result.output
    assert "trace.json" in result.output
    assert not list((tmp_path / "bf16").glob("*.safetensors"))


def test_a_trace_takes_the_place_of_no_file_of_the_source(int4: Path, tmp_path: Path) -> None:
    before = (int4 / "config.json").read_bytes()
    trace = Trace(int4 / "config.json")
    with pytest.raises(KconvertError, match=r"--trace .*config\.json lies inside SRC; choose a file outside"):
        convert(plan(int4, Recipe("bf16")), tmp_path / "bf16", trace=trace)
    assert (int4 / "config.json").read_bytes() == before
    assert not (tmp_path / "bf16").exists()
