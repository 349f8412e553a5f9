"""Conversions of a repository of the Hub: what is fetched, what stays on the disk, and how a run goes on after a kill."""

import signal
from contextlib import suppress
from pathlib import Path

import pytest

import kconvert

from .conftest import SHARDS, wait_for
from .faults import cut, status
from .server import Content

GENEROUS = ("--disk-budget", "20MB")
SOURCES = r"resolve/.*\.safetensors$"
HEADERS = 10 << 16  # the first read of each


@pytest.fixture
def weights(int4):
    """Bytes of all source files."""
    return sum(path.stat().st_size for path in int4.glob("*.safetensors"))


@pytest.mark.parametrize("options", [(), GENEROUS], ids=["cached", "within a budget"])
def test_a_conversion_from_the_hub_writes_the_bytes_of_a_local_one(remote, command, whole, tree, tmp_path, options):
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, *options)
    assert tree(tmp_path / "dst") == whole
    assert {path.name for path in (tmp_path / "dst" / ".kconvert").iterdir()} == {"journal.jsonl", "lock"}


def test_without_a_budget_source_files_stay_in_the_clients_cache(hub, remote, command, tmp_path, int4):
    from huggingface_hub import snapshot_download

    command.ok("int4-to-bf16", remote, tmp_path / "one", *SHARDS)
    hub.requests.clear()
    command.ok("convert", remote, tmp_path / "two", "--to", "fp8")
    assert hub.sent(SOURCES) <= HEADERS
    copy = Path(snapshot_download(remote))
    assert all((copy / path.name).read_bytes() == path.read_bytes() for path in int4.glob("*.safetensors"))
    assert not list(copy.parents[1].rglob("*.incomplete"))


@pytest.mark.parametrize("options", [(), GENEROUS], ids=["cached", "within a budget"])
def test_what_the_cache_has_is_not_fetched_and_not_deleted(hub, remote, command, whole, tree, tmp_path, options):
    from huggingface_hub import snapshot_download

    copy = tree(Path(snapshot_download(remote)))
    hub.requests.clear()
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, *options)
    assert hub.sent(SOURCES) <= HEADERS
    assert tree(tmp_path / "dst") == whole
    assert tree(Path(snapshot_download(remote))) == copy


def usage(folder):
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it has just been renamed or deleted
            found += path.stat().st_size if path.is_file() and path.name != "journal.jsonl" else 0
    return found


@pytest.mark.parametrize("push", [None, "me/out"])
@pytest.mark.parametrize("kind", ["int4", "scattered"])
def test_the_smallest_budget_is_enough_and_never_exceeded(request, hub, kind, push, tmp_path, tree, command):
    source = request.getfixturevalue(kind)
    hub.add("org/model", source)
    dst = tmp_path / "dst"
    plan = kconvert.plan("org/model", kconvert.Recipe("bf16", shard_size=1_000_000))
    terms = {"push": push, "disk_budget": 1 << 40}
    terms["disk_budget"] = kconvert.check(plan, dst, **terms).schedule.peak
    assert terms["disk_budget"] < plan.output_bytes + (0 if push else sum(s.nbytes for s in plan.source.files.values()))
    most = 0

    def measure(nbytes):
        nonlocal most
        most = max(most, usage(dst))

    kconvert.convert(plan, dst, advance=measure, **terms)
    assert 0 < most <= terms["disk_budget"]
    if push:
        assert not list(dst.glob("*.safetensors"))
    command.ok("int4-to-bf16", source, tmp_path / "local", *SHARDS)
    expected = tree(tmp_path / "local")
    found = {name: c.read(0, c.size) for name, c in hub.repos["me/out"].head().items()} if push else tree(dst)
    for files in (expected, found):
        del files["README.md"]  # the card
    assert found == expected


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_works(hub, remote, command, tmp_path):
    arguments = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, "--disk-budget")
    message = command.refused(*arguments, "1MB")
    assert "a disk budget of 1 MB is too small" in message
    assert hub.sent(SOURCES) <= HEADERS
    assert not (tmp_path / "dst").exists()
    smallest = int(message.partition("works is ")[2].split()[0])
    command.refused(*arguments, smallest - 1)
    command.ok(*arguments, smallest)


def test_downloads_go_on_while_shards_are_converted(hub, remote, command, tmp_path):
    """The first shard is in the journal before the last source file has been asked for."""
    seen = []
    journal = tmp_path / "dst" / ".kconvert" / "journal.jsonl"

    def look(handler):
        seen.append(journal.read_text().count("model-") if journal.exists() else 0)
        return False

    last = sorted(name for name in hub.repos[remote].head() if name.endswith(".safetensors"))
    budget = kconvert.check(
        kconvert.plan(remote, kconvert.Recipe("bf16", shard_size=300_000)), tmp_path / "dst", disk_budget=1 << 40
    ).schedule.peak
    for name in last:
        hub.fail(rf"{name}$", lambda handler: False, times=1)  # the header
        hub.fail(rf"{name}$", look, times=9)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", "--shard-size", "300kB", "--disk-budget", budget)
    assert seen[0] == 0
    assert max(seen) > 0


@pytest.mark.parametrize("options", [(), GENEROUS], ids=["cached", "within a budget"])
def test_a_killed_run_goes_on_inside_a_half_fetched_file(hub, remote, command, whole, tree, tmp_path, weights, options):
    hub.speed = 500_000  # so that a file takes seconds: none is to be finished between a look at it and the kill
    arguments = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, *options)
    sizes = {content.size for content in hub.repos[remote].head().values()}

    def halves():
        found = set()
        for path in tmp_path.rglob("*.incomplete"):
            with suppress(FileNotFoundError):  # it has just been completed
                found.add(path.stat().st_size)
        return found - sizes - {0}

    with command.start(*arguments) as process:
        wait_for(halves, process)
        process.send_signal(signal.SIGKILL)
    kept = halves()
    assert kept
    hub.speed = 0
    hub.requests.clear()
    command.ok(*arguments)
    assert tree(tmp_path / "dst") == whole
    begun = {int(request.span.removeprefix("bytes=").partition("-")[0]) for request in hub.requests if request.span}
    assert kept <= begun
    assert hub.sent(SOURCES) <= weights - sum(kept) + HEADERS


def test_shards_that_are_finished_are_not_fetched_for_again(hub, remote, command, whole, tree, tmp_path, weights):
    arguments = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, *GENEROUS)
    last = max(name for name in hub.repos[remote].head() if name.endswith(".safetensors"))
    hub.fail(rf"{last}$", lambda handler: False, times=1)  # the header
    hub.fail(rf"{last}$", status(403), times=9)
    command.refused(*arguments)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").glob("*.safetensors")}
    assert finished
    hub.faults.clear()
    hub.requests.clear()
    command.ok(*arguments)
    assert tree(tmp_path / "dst") == whole
    assert {name: (tmp_path / "dst" / name).stat().st_mtime_ns for name in finished} == finished
    assert hub.sent(SOURCES) < weights


def stop_in_the_middle(hub, command, arguments):
    hub.fail(SOURCES, status(403), times=1000)
    hub.faults.insert(0, type(hub.faults[0])(SOURCES, lambda handler: False, "GET", 12))
    command.refused(*arguments)
    hub.faults.clear()


@pytest.mark.parametrize("asked", [(), ("--revision", "main")], ids=["default", "main"])
def test_a_rerun_after_the_branch_moved_keeps_its_commit(hub, remote, command, whole, tree, tmp_path, asked):
    arguments = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, *asked)
    stop_in_the_middle(hub, command, arguments)
    commit = hub.repos[remote].branches["main"]
    hub.put(remote, {"config.json": Content(b"{}", is_large=False)})
    stop_in_the_middle(hub, command, arguments)
    command.ok(*arguments)
    assert tree(tmp_path / "dst") == whole
    assert f'"origin": "{remote}@{commit}"' in (tmp_path / "dst" / ".kconvert" / "journal.jsonl").read_text()


def test_a_rerun_that_asks_for_another_commit_is_refused(hub, remote, command, int4_copy, tmp_path):
    arguments = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    stop_in_the_middle(hub, command, arguments)
    shard = next(int4_copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    hub.add(remote, int4_copy, "v2")
    message = command.refused(*arguments, "--revision", "v2")
    assert "from source files that have changed since" in message


def test_values_are_checked_as_their_file_arrives(hub, raw, command, int4_copy, tmp_path):
    checkpoint = raw.load(int4_copy)
    name = "model.layers.2.mlp.experts.3.up_proj.weight_scale"
    checkpoint[name].data = b"\xc0\x7f" * (len(checkpoint[name].data) // 2)
    hub.add("org/nan", checkpoint.save())
    message = command.refused("int4-to-bf16", "org/nan", tmp_path / "dst", *SHARDS, *GENEROUS)
    assert name in message
    assert "is not finite" in message
    assert not (tmp_path / "dst" / "config.json").exists()


def test_a_broken_connection_costs_only_what_had_not_arrived(hub, remote, command, whole, tree, tmp_path, weights):
    command.ok("inspect", remote)
    hub.requests.clear()
    hub.fail(SOURCES, cut(100_000), times=6)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole
    assert hub.sent(SOURCES) <= weights + HEADERS


@pytest.mark.parametrize("name", [".kconvert", "-rf", "a/" + "b" * 200 + "/" + "c" * 200], ids=["ours", "flag", "long"])
def test_side_files_may_have_strange_names(hub, remote, command, whole, tree, tmp_path, name):
    hub.put(remote, {**hub.repos[remote].head(), name: Content(b"x", is_large=False)})
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole | ({name: b"x"} if name != ".kconvert" else {})
