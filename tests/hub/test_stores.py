"""The Hub on one side and an object store on the other; and ranks that fetch from the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from s3_server import Bucket, bucket, no_waiting

from kconvert import Recipe, plan

from .conftest import SHARDS, Command
from .server import Hub
from .test_upload import published, without_card

__all__ = ["bucket", "no_waiting"]
STORE, REPO = "s3://models/bf16", "me/Tiny-K2-BF16"


@pytest.mark.parametrize("options", [(), ("--disk-budget", "12MB")], ids=["all the disk", "within a budget"])
def test_from_the_hub_to_a_store(
    hub: Hub, remote: str, bucket: Bucket, command: Command, whole: dict[str, bytes], options: tuple[str, ...]
) -> None:
    command.ok("int4-to-bf16", remote, STORE, *SHARDS, *options)
    assert bucket.files(STORE) == whole


def test_from_a_store_to_the_hub(
    hub: Hub, int4: Path, bucket: Bucket, command: Command, whole: dict[str, bytes]
) -> None:
    bucket.put_files(int4, "models/int4")
    command.ok("int4-to-bf16", "s3://models/int4", f"hf://{REPO}", *SHARDS, "--disk-budget", "12MB")
    assert without_card(published(hub, REPO)) == without_card(whole)
    assert b"Made from `s3://models/int4` by kconvert" in published(hub, REPO)["README.md"]


@pytest.mark.parametrize("place", [STORE, "directory"])
def test_ranks_that_fetch_from_the_hub(
    hub: Hub, remote: str, bucket: Bucket, command: Command, whole: dict[str, bytes], tmp_path: Path, place: str, tree
) -> None:
    out = place if place == STORE else tmp_path / "out"
    for index in (1, 0):
        command.ok("int4-to-bf16", remote, out, *SHARDS, "--worker", f"{index}/2", "--disk-budget", "12MB")
        shutil.rmtree(tmp_path / "hf" / "hub")  # the next is another machine
    command.ok("finalize", out)
    assert (bucket.files(STORE) if place == STORE else tree(tmp_path / "out")) == whole


@pytest.mark.parametrize("place", [STORE, "directory"])
def test_a_rank_that_comes_late_reads_the_commit_of_the_first(
    hub: Hub, remote: str, bucket: Bucket, command: Command, whole: dict[str, bytes], tmp_path: Path, place: str, tree
) -> None:
    out = place if place == STORE else tmp_path / "out"
    command.ok("int4-to-bf16", remote, out, *SHARDS, "--worker", "1/2")
    files = dict(hub.repos[remote].head())
    hub.put(remote, {name: files[name] for name in files if name != "LICENSE"})
    command.ok("int4-to-bf16", remote, out, *SHARDS, "--worker", "0/2")
    command.ok("finalize", out)
    assert (bucket.files(STORE) if place == STORE else tree(tmp_path / "out")) == whole


def test_a_run_into_a_store_keeps_to_the_commit_that_it_began_with(
    hub: Hub, remote: str, bucket: Bucket, command: Command, whole: dict[str, bytes], tmp_path: Path
) -> None:
    command.ok("int4-to-bf16", remote, STORE, *SHARDS)
    bucket.remove(STORE, "config.json", min(name for name in whole if name.endswith(".safetensors")))
    files = dict(hub.repos[remote].head())
    hub.put(remote, {name: files[name] for name in files if name != "LICENSE"})
    command.ok("int4-to-bf16", remote, STORE, *SHARDS)
    assert bucket.files(STORE) == whole


def test_what_ranks_have_made_is_sent_to_the_hub_by_the_same_command_without_them(
    hub: Hub, remote: str, command: Command, whole: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("int4-to-bf16", remote, tmp_path / "out", *SHARDS)
    said = command.refused(*words, "--worker", "0/2", "--push", REPO)
    assert "let DST be a directory, and when it is complete give the same command without ranks --push" in said
    for index in (1, 0):
        command.ok(*words, "--worker", f"{index}/2")
    command.ok("finalize", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}

    command.ok(*words, "--push", REPO)

    assert without_card(published(hub, REPO)) == without_card(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing was made again"


def test_a_plan_that_is_made_again_elsewhere_reads_the_commit_of_the_first(hub: Hub, remote: str) -> None:
    made = plan(remote, Recipe("bf16"))
    files = dict(hub.repos[remote].head())
    hub.put(remote, {name: files[name] for name in files if name != "LICENSE"})

    assert made.again is not None
    again = made.again()

    assert (again.hash, again.stamp) == (made.hash, made.stamp)
    assert plan(remote, Recipe("bf16")).hash != made.hash
