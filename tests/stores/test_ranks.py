"""Ranks whose DST is in an object store, or whose SRC is elsewhere: nothing is shared but the store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import SECRET, Bucket, Request, hang, status

from kconvert.cli import main  # noqa: F401  what the processes below import

from .conftest import OUT, SHARDS, Tree
from .test_writing import LAST, SMALL, is_write, ok, refused, run


def start(*words: object, machine: str = "one") -> subprocess.Popen[str]:
    """A process on a machine of its own, as far as the disk goes."""
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": f"{os.environ['XDG_CACHE_HOME']}-{machine}"},
    )


def finish(bucket: Bucket, whole: dict[str, bytes]) -> None:
    """Close DST, which was unfinished before."""
    assert not bucket.files(OUT).keys() & set(LAST)
    ok("finalize", OUT)
    assert bucket.files(OUT) == whole
    state = [name for name in bucket.files(OUT, hidden=True) if name.startswith(".kconvert/")]
    assert {name.split("/")[1] for name in state} == {"plan.json", "done"}


def in_turn(arguments: tuple[object, ...], *options: object) -> None:
    for index in (2, 0, 1):
        ok(*arguments, "--worker", f"{index}/3", *options)


# Together.


@pytest.mark.parametrize("options", [(), ("--disk-budget", "1MB")], ids=["all the disk", "within a budget"])
def test_ranks_at_once_write_what_one_machine_writes(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], options: tuple[str, ...]
) -> None:
    ranks = [start(*arguments, "--worker", f"{i}/3", *options, machine=str(i)) for i in range(3)]
    assert [process.communicate(timeout=120)[1] for process in ranks] == [""] * 3
    sent = [name for name in bucket.sent(OUT) if name.endswith(".safetensors")]
    assert sorted(sent) == sorted(name for name in whole if name.endswith(".safetensors")), "each shard once"
    finish(bucket, whole)


def test_ranks_one_after_the_other(bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]) -> None:
    in_turn(arguments)
    finish(bucket, whole)
    assert "was closed already" in ok("finalize", OUT)
    assert "was finished already" in ok(*arguments)
    assert "had nothing left to do" in ok(*arguments, "--worker", "1/3")


def test_the_last_rank_closes_when_it_is_asked_to(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    for index in (2, 0, 1):
        assert "config.json" not in bucket.files(OUT)
        said = ok(*arguments, "--worker", f"{index}/3", "--finalize-when-complete")
    assert bucket.files(OUT) == whole
    assert f"{OUT} is complete" in said


def test_ranks_that_end_together_close_once_or_twice_and_the_same(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    options = ("--finalize-when-complete",)
    ranks = [start(*arguments, "--worker", f"{i}/3", *options, machine=str(i)) for i in range(3)]
    assert [process.communicate(timeout=120)[1] for process in ranks] == [""] * 3
    assert bucket.files(OUT) == whole


def test_who_closes_while_another_does_hears_of_no_fault(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    in_turn(arguments)
    held, free = threading.Event(), threading.Event()

    def watch(request: Request) -> None:
        if request.method == "PUT" and request.name.endswith("/bf16/config.json") and not held.is_set():
            held.set()
            free.wait(60)

    bucket.watch = watch
    first = start("finalize", OUT)
    assert held.wait(60)
    ok("finalize", OUT)  # and clears away what the first is about to copy
    free.set()
    assert first.communicate(timeout=60)[1] == ""
    assert bucket.files(OUT) == whole


def test_ranks_from_a_store_to_a_store(bucket: Bucket, stored: str, whole: dict[str, bytes]) -> None:
    in_turn(("int4-to-bf16", stored, OUT, *SHARDS), "--disk-budget", "5MB")
    finish(bucket, whole)


@pytest.mark.parametrize("options", [(), ("--disk-budget", "8MB")], ids=["all the disk", "within a budget"])
def test_ranks_from_a_store_to_a_directory(
    bucket: Bucket, stored: str, whole: dict[str, bytes], tmp_path: Path, tree: Tree, options: tuple[str, ...]
) -> None:
    in_turn(("int4-to-bf16", stored, tmp_path / "out", *SHARDS), *options)
    ok("finalize", tmp_path / "out")
    assert tree(tmp_path / "out") == whole
    assert {path.name for path in (tmp_path / "out" / ".kconvert").iterdir()} == {"journal.jsonl", "lock"}


def test_a_rank_fetches_what_its_own_shards_need(bucket: Bucket, stored: str, tmp_path: Path) -> None:
    def fetched(*options: str) -> int:
        bucket.asked.clear()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ok("int4-to-bf16", stored, tmp_path / "out", "--shard-size", "100kB", *options)
        ends = [span.removeprefix("bytes=").split("-") for name, span in bucket.asked if name.endswith(".safetensors")]
        return sum(int(last) - int(first) + 1 for first, last in ends)

    assert fetched("--worker", "0/40") < fetched()


def test_a_dry_run_of_a_rank_speaks_of_its_share(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    said = ok(*arguments, "--worker", "1/3", "--dry-run")
    share = said.partition("rank 1 of 3: ")[2].partition(" in ")[0]
    assert f"upload: {share} to {OUT}" in said
    assert not bucket.files(OUT, hidden=True)


# What is wrong with a rank.


def test_a_missing_rank_is_named(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    for index in (0, 2):
        ok(*arguments, "--worker", f"{index}/3")
    assert f"{OUT} is not complete: rank 1 of 3 has not finished" in refused("finalize", OUT)
    assert not bucket.files(OUT).keys() & set(LAST)


def test_without_rank_0_the_small_files_are_missing(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    for index in (1, 2):
        ok(*arguments, "--worker", f"{index}/3")
    assert "rank 0 of 3 has not finished" in refused("finalize", OUT)
    ok(*arguments, "--worker", "0/3")
    bucket.remove(OUT, ".kconvert/closing/config.json")
    assert "lacks its side files and config.json, which rank 0 of 3 leaves" in refused("finalize", OUT)
    ok(*arguments, "--worker", "0/3")
    ok("finalize", OUT)


def test_a_rank_without_work_leaves_nothing(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    assert "had nothing left to do" in ok(*arguments[:-1], "1GB", "--worker", "1/2")
    assert not bucket.files(OUT, hidden=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--worker", "0/4"), "is shared by 3 ranks, and rank 0 of 4 is none of them; go on with 3"),
        (("--worker", "0/3", "--shard-size", "400kB"), "holds a conversion with other settings, or of another source"),
        (("--worker", "0/3", "--overwrite"), "ranks replace nothing"),
    ],
    ids=["count", "plan", "overwrite"],
)
def test_a_stranger_among_the_ranks_is_refused(
    bucket: Bucket, arguments: tuple[object, ...], options: tuple[str, ...], words: str
) -> None:
    ok(*arguments, "--worker", "1/3")
    before = bucket.files(OUT, hidden=True)
    assert words in refused(*arguments, *options)
    assert bucket.files(OUT, hidden=True) == before


def test_a_rank_of_another_version_is_refused(
    bucket: Bucket, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(*arguments, "--worker", "1/3")
    for module in ("kconvert.planning.plan", "kconvert.run.state.heads"):
        monkeypatch.setattr(sys.modules[module], "__version__", "99.0")
    assert "holds a conversion by kconvert" in refused(*arguments, "--worker", "0/3")


def test_finalize_of_what_no_ranks_have_written_is_refused(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    assert f"{OUT} is no DST that ranks have written to" in refused("finalize", OUT)
    bucket.watch = lambda request: status("403 No") if request.name.endswith("/config.json") else None
    refused(*arguments)
    bucket.watch = lambda request: None
    assert "is unfinished, and not by ranks; run the command again that began it" in refused("finalize", OUT)


def test_a_state_that_is_damaged_is_one_sentence(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    ok(*arguments, "--worker", "0/3")
    bucket.replace(OUT, ".kconvert/plan.json", b'{"head": {}, "ranks": 3, "shards": [["../x", 1, 1, ""]]}')
    for words in (("finalize", OUT), (*arguments, "--worker", "1/3"), arguments):
        assert "plan.json is not what kconvert wrote" in refused(*words)


def test_a_shard_that_somebody_changed_is_missing(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    in_turn(arguments)
    name = min(name for name in whole if name.endswith(".safetensors"))
    bucket.replace(OUT, name, whole[name] + b" ")
    assert f"missing or changed since, the first {name}; run that rank again" in refused("finalize", OUT)
    in_turn(arguments)
    finish(bucket, whole)


# When something dies.


def test_a_rank_that_is_killed_goes_on_anywhere(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    for index in (0, 2):
        ok(*arguments, "--worker", f"{index}/3")
    for goal, machine in ((12, "one"), (30, "two"), (40, "three")):
        bucket.requests.clear()
        slow = threading.Event()

        def watch(request: Request, slow: threading.Event = slow) -> None:
            slow.wait(0.005)

        bucket.watch = watch
        process = start(*arguments, "--worker", "1/3", machine=machine)
        while len(bucket.requests) < goal and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        bucket.watch = lambda request: None
        files = bucket.files(OUT)
        assert not files.keys() & set(LAST)
        assert {name for name in files if files[name] != whole[name]} == set()
    ok(*arguments, "--worker", "1/3")
    finish(bucket, whole)


def test_finalize_that_is_killed_is_run_again(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    in_turn(arguments)
    begun = threading.Event()

    def watch(request: Request) -> Callable[..., object] | None:
        if request.method == "PUT" and request.name.endswith("/bf16/config.json"):
            begun.set()
            return hang(20)
        return None

    bucket.watch = watch
    process = start("finalize", OUT)
    assert begun.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    bucket.watch = lambda request: None
    finish(bucket, whole)


def test_a_run_without_ranks_takes_over_and_other_ranks_after_it(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    ok(*arguments, "--worker", "1/3")
    before = set(bucket.sent(OUT))
    last = max(name for name in whole.keys() - before if name.endswith(".safetensors"))
    bucket.watch = lambda request: status("403 No") if is_write(request) and request.name.endswith(last) else None
    refused(*arguments)
    bucket.watch = lambda request: None
    for index in range(2):
        ok(*arguments, "--worker", f"{index}/2")
    finish(bucket, whole)
    assert {name for name in before if name.endswith(".safetensors")} <= bucket.files(OUT).keys()


def test_two_ranks_of_one_number_write_the_same(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    ranks = [
        start(*arguments, "--worker", f"{index}/2", machine=name) for index, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert [process.communicate(timeout=120)[1] for process in ranks] == [""] * 3
    finish(bucket, whole)


def test_of_two_on_one_machine_the_second_is_refused(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    begun, free = threading.Event(), threading.Event()

    def watch(request: Request) -> None:
        if request.method == "PUT":
            begun.set()
            free.wait(60)

    bucket.watch = watch
    first = start(*arguments, "--worker", "0/2")
    assert begun.wait(60)
    second = start(*arguments, "--worker", "0/2")
    said = second.communicate(timeout=60)[1]
    free.set()
    assert first.communicate(timeout=60)[1] == ""
    assert "another kconvert is writing to" in said
    assert SECRET not in said
    assert run("finalize", OUT).exit_code == 2
