"""Outputs that go to an object store: what is there, when, and what becomes of it when the store or a process fails."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from s3_server import SECRET, Bucket, Request, hang, lost, reset, short, status, times

import kconvert
from kconvert import KconvertError, Recipe
from kconvert.cli import main
from kconvert.run import job
from kconvert.stores import writing

from .conftest import OUT, SHARD, SHARDS, Tree

LAST_WEIGHT = "model.layers.2.mlp.experts.3.up_proj"
LAST = ["config.json", "model.safetensors.index.json"]

# The command, whose shards go in parts of 128 kB and whose patience is short.
SMALL = """
from datetime import timedelta
from kconvert.stores import client, writing
from kconvert.cli import main
writing.PART, client.WAITS = 1 << 17, (0.01,) * 5
main()
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PART", 1 << 17)


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert SECRET not in result.output
    return result


def ok(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    """The one sentence of a command that ends with exit code 2."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def check_nothing_looks_whole(bucket: Bucket, whole: dict[str, bytes]) -> dict[str, bytes]:
    """Every object is what it will be, and config.json and the index are there only after all else; returns them."""
    files = bucket.files(OUT)
    assert {name for name, content in files.items() if content != whole[name]} == set()
    if whole.keys() - files.keys() - set(LAST):
        assert not files.keys() & set(LAST)
    return files


def recorded(bucket: Bucket) -> set[str]:
    """The shards that are known to be finished."""
    start = ".kconvert/done/"
    return {
        name.removeprefix(start).rpartition("/")[0] for name in bucket.files(OUT, hidden=True) if name.startswith(start)
    }


def is_shard(request: Request) -> bool:
    return request.name.startswith("models/kimi/bf16/model-") and request.name.endswith(".safetensors")


def is_write(request: Request) -> bool:
    return request.method in ("PUT", "POST", "DELETE")


# What is there, and when.


@pytest.mark.parametrize("options", [(), ("--disk-budget", "3MB")], ids=["all the disk", "within a budget"])
def test_an_output_in_a_store_has_the_bytes_of_one_in_a_directory(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], tmp_path: Path, options: tuple[str, ...]
) -> None:
    said = ok(*arguments, *options)
    assert f"shards to {OUT} in" in said
    assert bucket.files(OUT) == whole
    assert list((tmp_path / "cache" / "kconvert" / "sending").iterdir()) == []
    assert any(request.is_part for request in bucket.requests)


def test_config_and_index_are_written_last(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    ok(*arguments)
    assert bucket.sent(OUT)[-2:] == LAST


def test_a_place_is_listed_once_before_the_first_shard_and_once_at_the_end(
    bucket: Bucket, arguments: tuple[object, ...]
) -> None:
    def looks() -> int:
        bucket.requests.clear()
        ok(*arguments)
        return sum(request.method == "GET" and "list-type" in request.query for request in bucket.requests)

    assert looks() == 2
    assert looks() == 1, "all is there"
    bucket.remove(OUT, "config.json")
    assert looks() == 2


def test_what_passes_through_the_disk_keeps_within_the_budget(
    bucket: Bucket, arguments: tuple[object, ...], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    most = 0

    def weigh(request: Request) -> None:
        nonlocal most
        paths = [*(tmp_path / "cache" / "kconvert" / "sending").rglob("*.safetensors*")]
        most = max(most, sum(path.stat().st_size for path in paths if path.exists()))

    bucket.watch = weigh
    assert "a disk budget of 100 kB is too small for this plan" in refused(*arguments, "--disk-budget", "100kB")
    ok(*arguments, "--disk-budget", "2MB")
    assert 0 < most <= 2_000_000 < sum(map(len, whole.values()))


def test_a_store_may_be_on_both_sides(bucket: Bucket, stored: str, whole: dict[str, bytes]) -> None:
    ok("int4-to-bf16", stored, OUT, *SHARDS, "--disk-budget", "20MB")
    assert bucket.files(OUT) == whole
    assert run("verify", stored, OUT, "-q").exit_code == 0
    assert run("diff", OUT, OUT, "-q").exit_code == 0
    assert kconvert.inspect(OUT).parameters == kconvert.inspect(stored).parameters


def test_all_commands_that_write_take_a_store(bucket: Bucket, tmp_path: Path, tree: Tree) -> None:
    sizes = {"layers": 2, "experts": 2, "hidden": 256, "intermediate": 512, "moe-intermediate": 512, "vocab": 512}
    sizes |= {"heads": 4, "q-rank": 64, "kv-rank": 32}
    options = [word for name, size in sizes.items() for word in (f"--{name}", size)]
    ok("sample", tmp_path / "sample", *options)
    ok("sample", "s3://models/sample", *options)
    assert bucket.files("s3://models/sample") == tree(tmp_path / "sample")
    amx = ("--method", "AMXINT4", "--numa", 2, "--format", "kt")
    ok("repack-amx", tmp_path / "sample", tmp_path / "amx", *amx)
    ok("repack-amx", "s3://models/sample", "s3://models/amx", *amx)
    files, local = bucket.files("s3://models/amx"), tree(tmp_path / "amx")
    assert {name: files[name] for name in files if name.endswith(".kt")} == {
        n: local[n] for n in local if n.endswith(".kt")
    }


def test_a_dry_run_writes_nothing(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    assert f"to {OUT}" in ok(*arguments, "--dry-run")
    assert not bucket.files(OUT, hidden=True)


def test_a_folder_that_a_console_has_made_is_empty(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    bucket.put("models/kimi/bf16/", b"")
    ok(*arguments)
    assert bucket.files(OUT) == whole


def test_an_output_that_is_done_is_not_done_again(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    ok(*arguments)
    bucket.requests.clear()
    for options in ((), ("--disk-budget", "2MB"), ("--dry-run",)):
        ok(*arguments, *options)
    assert "was finished already" in ok(*arguments)
    assert not [request for request in bucket.requests if is_write(request)]


# What is there already.


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_place_with_something_in_it_is_refused(
    bucket: Bucket, arguments: tuple[object, ...], options: tuple[str, ...]
) -> None:
    bucket.put("models/kimi/bf16/notes.txt", b"precious")
    assert f"{OUT} is not empty (notes.txt); choose another DST, or --overwrite" in refused(*arguments, *options)
    assert bucket.files(OUT, hidden=True) == {"notes.txt": b"precious"}


def test_another_plan_is_refused(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    ok(*arguments)
    before = bucket.files(OUT, hidden=True)
    said = refused(*arguments, "--shard-size", "400kB")
    assert f"{OUT} holds a conversion with other settings, or of another source" in said
    assert bucket.files(OUT, hidden=True) == before


@pytest.mark.parametrize("ranks", [False, True])
def test_what_is_sent_is_kept_when_a_file_of_the_source_was_replaced_by_a_sound_one(
    bucket: Bucket, int4_copy: Path, whole: dict[str, bytes], ranks: bool
) -> None:
    words = ("int4-to-bf16", int4_copy, OUT, *SHARDS)
    if ranks:
        ok(*words, "--worker", "0/2")
    else:
        ok(*words)
        bucket.remove(OUT, *LAST)
    before, replaced = set(bucket.sent(OUT)), min(int4_copy.glob("*.safetensors"))
    replaced.touch()
    made = {
        place.file
        for step in kconvert.plan(int4_copy, Recipe("bf16", shard_size=SHARD)).steps
        if replaced.name in {origin.file for origin in step.origins}
        for place in step.writes
    }
    assert "without --worker, which keeps" in refused(*words, "--worker", "1/2")
    bucket.requests.clear()
    ok(*words)
    assert bucket.files(OUT) == whole
    again = {name for name in bucket.sent(OUT) if name.startswith("model-")}
    assert again == ({name for name in whole if name.startswith("model-")} - before) | made
    assert before - made - set(LAST)
    ok(*words)


def test_another_version_is_refused(
    bucket: Bucket, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(*arguments)
    for module in ("kconvert.planning.plan", "kconvert.run.state.heads"):
        monkeypatch.setattr(sys.modules[module], "__version__", "99.0")
    assert "holds a conversion by kconvert" in refused(*arguments)


def test_overwrite_replaces_the_checkpoint_and_nothing_else(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    ok(*arguments, "--shard-size", "100kB")
    bucket.put("models/kimi/bf16/notes.txt", b"precious")
    bucket.put("models/kimi/bf16/hf_quant_config.json", b"{}")
    ok(*arguments, "--overwrite")
    assert bucket.files(OUT) == whole | {"notes.txt": b"precious"}
    ok(*arguments)


def test_an_overwrite_that_is_killed_never_looks_whole(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    ok(*arguments, "--shard-size", "100kB")
    begun = threading.Event()

    def watch(request: Request) -> Callable[..., object] | None:
        if request.is_part:
            begun.set()
        return hang(5) if request.is_part else None

    bucket.watch = watch
    process = start(*arguments, "--overwrite")
    wait_for(begun.is_set, process)
    kill(process)
    bucket.watch = lambda request: None
    assert not check_nothing_looks_whole(bucket, whole).keys() & set(LAST)
    ok(*arguments)
    assert bucket.files(OUT) == whole


@pytest.mark.parametrize("other", ["s3://models/kimi/tiny", "s3://models/kimi", "s3://models/kimi/tiny/bf16"])
def test_a_source_is_never_overwritten(bucket: Bucket, stored: str, other: str) -> None:
    before = bucket.files(stored)
    said = refused("int4-to-bf16", stored, other, "--overwrite")
    assert "choose another place for the output, beside SRC" in said
    assert bucket.files(stored) == before


def test_places_with_like_names_do_not_overlap(bucket: Bucket, stored: str) -> None:
    ok("int4-to-bf16", stored, f"{stored}-bf16")


@pytest.mark.parametrize("change", ["content", "gone"])
def test_a_shard_that_somebody_changed_is_made_again(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], change: str
) -> None:
    ok(*arguments)
    name = min(name for name in whole if name.endswith(".safetensors"))
    if change == "gone":
        bucket.remove(OUT, name)
    else:
        bucket.replace(OUT, name, whole[name][:-1] + b"!")
    bucket.requests.clear()
    ok(*arguments)
    assert bucket.files(OUT) == whole
    assert [request.name for request in bucket.requests if is_shard(request) and "uploads" in request.query] == [
        f"models/kimi/bf16/{name}"
    ]


# Faults.


@pytest.mark.parametrize(
    "fault",
    [status("500 Server Error"), status("503 Slow Down"), reset, lost, short],
    ids=["500", "503", "reset", "lost answer", "short body"],
)
@pytest.mark.parametrize("method", ["PUT", "POST", "HEAD", "GET"])
def test_faults_that_pass_change_nothing(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], fault: Callable[..., object], method: str
) -> None:
    bucket.watch = times(3, fault, lambda request: request.method == method)
    ok(*arguments)
    assert bucket.files(OUT) == whole


def test_a_store_that_does_not_answer_is_asked_again(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kconvert.stores.client, "TIMEOUT", "1s")
    bucket.watch = times(3, hang(3), is_shard)
    ok(*arguments)
    assert bucket.files(OUT) == whole


def test_a_store_that_refuses_writes_for_a_while_is_waited_for(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kconvert.stores.client, "WAITS", (0.2,) * 20)
    until: list[float] = []

    def watch(request: Request) -> Callable[..., object] | None:
        if is_shard(request) and is_write(request) and len(bucket.sent(OUT)) > 6:
            until.append(until[0] if until else time.monotonic() + 2)
            return status("503 Slow Down") if time.monotonic() < until[0] else None
        return None

    bucket.watch = watch
    ok(*arguments)
    assert len(until) > 3
    assert bucket.files(OUT) == whole


def test_a_store_that_stays_away_ends_the_run_and_the_next_one_goes_on(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    def watch(request: Request) -> Callable[..., object] | None:
        full = sum(name.endswith(".safetensors") for name in bucket.sent(OUT)) >= 4
        return status("503 Slow Down") if full and is_write(request) else None

    bucket.watch = watch
    assert (
        "the store failed or did not answer; run the same command again, a conversion goes on from what it has"
        in refused(*arguments)
    )
    files = check_nothing_looks_whole(bucket, whole)
    assert not files.keys() & set(LAST)
    done = recorded(bucket)
    assert len(done) >= 2
    bucket.watch = lambda request: None
    bucket.requests.clear()
    ok(*arguments)
    assert bucket.files(OUT) == whole
    assert not done & set(bucket.sent(OUT))


def test_a_store_that_may_not_be_written_is_one_sentence(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    bucket.watch = lambda request: status("403 Forbidden") if is_write(request) else None
    assert f"{OUT}: cannot write .kconvert/plan.json, access was refused; check the credentials" in refused(*arguments)


def test_a_store_without_conditional_writes_is_one_sentence(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    fault = status("501 Not Implemented")
    bucket.watch = lambda request: fault if request.name.endswith("/plan.json") and is_write(request) else None
    assert "takes no writes on condition that there is no such object" in refused(*arguments)


def test_a_bucket_of_another_region_is_one_sentence(bucket: Bucket, arguments: tuple[object, ...]) -> None:
    bucket.watch = lambda request: status("301 Moved Permanently")
    assert "the bucket is in another region; set that" in refused(*arguments)


def test_a_whole_bucket_may_be_the_place(bucket: Bucket, int4: Path, whole: dict[str, bytes]) -> None:
    bucket.put("all", b"")
    ok("int4-to-bf16", int4, "s3://all", *SHARDS)
    assert bucket.files("s3://all") == whole


def test_a_bucket_that_is_not_there_is_one_sentence(bucket: Bucket, int4: Path) -> None:
    assert "there is no bucket 'nowhere'" in refused("int4-to-bf16", int4, "s3://nowhere/a")


def test_half_an_object_never_counts_as_a_shard(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that says that it has what it has only half of."""
    monkeypatch.setattr(writing, "PART", 8 << 20)
    import io

    def halve(app: Callable[..., object], environ: dict[str, object], start: Callable[..., object]) -> object:
        length = int(str(environ["CONTENT_LENGTH"])) // 2
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))  # type: ignore[attr-defined]
        environ["CONTENT_LENGTH"] = str(length)
        environ.pop("HTTP_X_AMZ_CONTENT_SHA256", None)
        return app(environ, start)

    bucket.watch = times(1, halve, lambda request: is_shard(request) and request.method == "PUT")
    assert "were sent; run the same command again" in refused(*arguments)
    assert not bucket.files(OUT).keys() & set(LAST)
    ok(*arguments)
    assert bucket.files(OUT) == whole


def test_a_bad_value_is_said_while_shards_are_still_being_sent(
    bucket: Bucket, int4_copy: Path, whole: dict[str, bytes]
) -> None:
    words = ("int4-to-bf16", int4_copy, OUT, *SHARDS)
    scale = kconvert.plan(int4_copy, Recipe("bf16")).source.tensors[f"{LAST_WEIGHT}.weight_scale"]
    stamp = (int4_copy / scale.file).stat().st_mtime_ns
    on_their_way, said = threading.Event(), threading.Event()

    def watch(request: Request) -> None:
        if is_shard(request) and request.method in ("PUT", "POST"):
            on_their_way.set()
            said.wait(60)

    def poke(value: bytes) -> None:
        with open(int4_copy / scale.file, "rb+") as file:
            file.seek(scale.start)
            file.write(value)
        os.utime(int4_copy / scale.file, ns=(stamp, stamp))

    sound = (int4_copy / scale.file).read_bytes()[scale.start : scale.start + 2]
    poke(b"\xc0\x7f")
    bucket.watch = watch
    assert "is not finite" in refused(*words, "--threads", 1)
    assert on_their_way.is_set()
    assert not [name for name in bucket.sent(OUT) if name.startswith("model-")]
    said.set()
    poke(sound)
    ok(*words)
    assert bucket.files(OUT) == whole


# Kills.


def test_a_run_that_is_killed_in_the_middle_of_a_shard_goes_on_on_another_machine(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], tmp_path: Path
) -> None:
    seen: list[str] = []

    def watch(request: Request) -> Callable[..., object] | None:
        if request.is_part and sum(name.endswith(".safetensors") for name in bucket.sent(OUT)) >= 3:
            seen.append(request.name.rpartition("/")[2])
            return hang(20)
        return None

    bucket.watch = watch
    process = start(*arguments)
    wait_for(lambda: len(seen) > 1, process)
    kill(process)
    bucket.watch = lambda request: None
    files = check_nothing_looks_whole(bucket, whole)
    assert not files.keys() & {*seen, *LAST}, "an unfinished upload is to be seen"
    done = recorded(bucket)
    assert len(done) >= 2
    bucket.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        ok(*arguments)
    assert bucket.files(OUT) == whole
    assert not done & set(bucket.sent(OUT))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_random_kills_never_leave_what_looks_whole(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], seed: int
) -> None:
    chance = random.Random(seed)
    slow = threading.Event()

    def watch(request: Request) -> None:
        slow.wait(0.004)

    bucket.watch = watch
    for _ in range(4):
        process, writes = start(*arguments), chance.randint(1, 60)
        goal = len(bucket.requests) + writes
        while len(bucket.requests) < goal and process.poll() is None:
            time.sleep(0.002)
        kill(process)
        check_nothing_looks_whole(bucket, whole)
    bucket.watch = lambda request: None
    ok(*arguments)
    assert bucket.files(OUT) == whole


def test_a_close_that_is_killed_is_not_closed_and_then_is(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes]
) -> None:
    bucket.watch = lambda request: (
        hang(20) if request.method == "PUT" and request.name.endswith("/config.json") else None
    )
    process = start(*arguments)
    wait_for(lambda: "tokenizer.json" in bucket.sent(OUT), process)
    kill(process)
    bucket.watch = lambda request: None
    check_nothing_looks_whole(bucket, whole)
    ok(*arguments)
    assert bucket.files(OUT) == whole


# Two at once.


def test_two_runs_of_one_plan_write_the_same_bytes(
    bucket: Bucket, arguments: tuple[object, ...], whole: dict[str, bytes], tmp_path: Path
) -> None:
    both = [start(*arguments, XDG_CACHE_HOME=str(tmp_path / name)) for name in ("one", "two")]
    assert [process.communicate(timeout=120)[1] for process in both] == ["", ""]
    assert bucket.files(OUT) == whole
    bucket.requests.clear()
    ok(*arguments)
    assert not [request for request in bucket.requests if is_write(request)]


def test_what_another_run_finishes_while_this_one_begins_is_not_waited_for(
    stored: str, whole: dict[str, bytes], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out, swift, written = (
        kconvert.plan(stored, Recipe("bf16", shard_size=SHARD)),
        tmp_path / "out",
        job._journal,
        [0],
    )
    budget = kconvert.check(made, out).schedule.peak  # no file may stay longer than it must

    def interrupt(nbytes: int) -> None:
        written[0] += nbytes
        if written[0] > made.output_bytes / 2:
            raise KeyboardInterrupt

    def another_first(*arguments: Any) -> Any:
        monkeypatch.setattr(job, "_journal", swift)
        with pytest.raises(KeyboardInterrupt):
            kconvert.convert(made, out, disk_budget=budget, threads=1, advance=interrupt)
        return swift(*arguments)

    monkeypatch.setattr(job, "_journal", another_first)
    thread = threading.Thread(target=lambda: kconvert.convert(made, out, disk_budget=budget), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for room that nobody gives back"
    assert tree(out) == whole


def test_of_two_plans_that_begin_together_one_is_refused(
    bucket: Bucket, arguments: tuple[object, ...], int4: Path
) -> None:
    meeting = threading.Barrier(2, timeout=30)

    def watch(request: Request) -> None:
        if request.method == "PUT" and request.name.endswith("/plan.json"):
            meeting.wait()

    bucket.watch = watch
    both = [
        start(*arguments),
        start(*arguments, "--shard-size", "200kB", XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"] + "2"),
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert "holds a conversion with other settings" in "".join(said)
    ok("verify", int4, OUT, "-q")


# Credentials.


def test_credentials_are_in_nothing_that_is_written(
    bucket: Bucket, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    ok(*arguments, "-v")
    assert not [name for name, content in bucket.files(OUT, hidden=True).items() if SECRET.encode() in content]
    assert not [
        path for path in (tmp_path / "cache").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("address", ["gcs://models/a", "S3://models/a", "s3:/models/a", "https://host/a", "hf:/org/a"])
def test_an_address_of_another_kind_is_not_made_as_a_directory(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused("int4-to-bf16", int4, address)
    assert f"DST {address} is no address that kconvert writes to" in said
    assert f"give ./{address}" in said
    assert not [*tmp_path.iterdir()]
    ok("int4-to-bf16", int4, f"./{address}", "-q")
    ok("int4-to-bf16", int4, address, "-q")


def test_a_disk_too_small_for_what_passes_through_is_not_called_a_budget(
    bucket: Bucket, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kconvert.run.disk.free_bytes", lambda directory: 100_000)
    said = refused(*arguments)
    assert "kB more, but the disk has 100 kB free; free some space or choose another disk by XDG_CACHE_HOME" in said
    assert "a disk budget of 50 kB is too small" in refused(*arguments, "--disk-budget", "50kB")


@pytest.mark.parametrize(
    "address",
    [f"s3://key:{SECRET}@models/a", f"s3://models/a?secret={SECRET}", "s3://models/a/../b", "s3://models/%61"],
)
def test_an_address_with_more_in_it_than_a_place_is_refused_without_being_repeated(
    bucket: Bucket, int4: Path, address: str
) -> None:
    for words in (("int4-to-bf16", int4, address), ("inspect", address), ("verify", int4, address)):
        assert "write s3://BUCKET/PREFIX without credentials" in refused(*words)


def test_a_push_and_a_store_are_refused(bucket: Bucket, int4: Path) -> None:
    assert "leave out one of them" in refused("int4-to-bf16", int4, OUT, "--push", "me/out")
    assert "is no repository of the Hub" in refused("int4-to-bf16", int4, "somewhere", "--push", OUT)


# Unfinished outputs.


@pytest.fixture
def unfinished(bucket: Bucket, arguments: tuple[object, ...]) -> Iterator[str]:
    """A DST with all shards, and without config.json and index."""
    ok(*arguments)
    bucket.remove(OUT, *LAST)
    yield OUT
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def test_who_reads_it_hears_that_an_output_is_unfinished(unfinished: str, int4: Path) -> None:
    for result in (run("verify", int4, unfinished), run("inspect", unfinished)):
        assert result.exit_code > 0
        assert f"{OUT} is unfinished, it has no config.json; run the conversion again" in result.stderr


def test_the_library_says_it_in_one_sentence_too(bucket: Bucket, int4: Path) -> None:
    plan = kconvert.plan(int4, Recipe("bf16"))
    kconvert.convert(plan, OUT)
    with pytest.raises(KconvertError, match="holds a conversion with other settings"):
        kconvert.convert(kconvert.plan(int4, Recipe("fp8")), OUT)
    assert kconvert.check(plan, OUT).settled >= {shard.name for shard in plan.shards}
