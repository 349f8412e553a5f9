"""An output that goes to the Hub: what is there, when, and who sees it."""

import shlex
import signal
from pathlib import Path

import pytest

import kconvert

from .conftest import SHARDS, wait_for
from .faults import cut, hang, reset, status
from .server import Content

OUT = "me/Tiny-K2-BF16"
CARD = """---
license: other
license_name: modified-mit
license_link: LICENSE
base_model: someone/else
tags: [compressed-tensors]
---
# Tiny
"""


@pytest.fixture
def licensed(hub, remote):
    """The repository with a licence in its model card."""
    hub.put(remote, {**hub.repos[remote].head(), "README.md": Content(CARD.encode(), is_large=False)})
    return remote


def published(hub, repo=OUT):
    return {name: content.read(0, content.size) for name, content in hub.repos[repo].head().items()}


def without_card(files):
    return {name: data for name, data in files.items() if name != "README.md"}


@pytest.fixture
def arguments(remote, tmp_path):
    return ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, "--push", OUT)


@pytest.mark.parametrize("options", [(), ("--disk-budget", "20MB")], ids=["kept", "within a budget"])
def test_an_output_is_pushed_whole_in_one_private_commit(hub, command, arguments, whole, tree, tmp_path, options):
    said = command.ok(*arguments, *options)
    assert without_card(published(hub)) == without_card(whole)
    assert len(hub.repos[OUT].messages) == 1
    assert hub.repos[OUT].private
    assert f"to {tmp_path / 'dst'} and {OUT}" in said
    if options:
        assert not list((tmp_path / "dst").glob("*.safetensors"))
    else:
        assert tree(tmp_path / "dst") == whole


@pytest.mark.parametrize("name", [OUT, f"hf://{OUT}"])
def test_a_destination_on_the_hub_leaves_nothing_on_the_disk(hub, remote, command, whole, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    said = command.ok("int4-to-bf16", remote, name, *SHARDS)
    assert f"shards to {OUT} in" in said
    assert without_card(published(hub)) == without_card(whole)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".safetensors"]
    assert left == []
    assert list((tmp_path / "hf" / "kconvert").iterdir()) == []


def test_a_branch_of_a_repository_can_be_the_destination(hub, int4, command, whole):
    hub.put(OUT, {"README.md": Content(b"mine", is_large=False)}, "bf16")
    command.ok("int4-to-bf16", int4, f"hf://{OUT}@bf16", *SHARDS)
    files = hub.repos[OUT].head("bf16")
    assert {name: files[name].read(0, files[name].size) for name in files if name != "README.md"} == without_card(whole)
    assert list(hub.repos[OUT].branches) == ["bf16"]


def test_the_card_says_what_it_is_made_from_and_how(hub, licensed, kconvert, tmp_path):
    arguments = ("int4-to-bf16", licensed, tmp_path / "dst dir", *SHARDS, "--push", OUT)
    assert kconvert(*arguments).returncode == 0
    commit = hub.repos[licensed].branches["main"]
    card = published(hub)["README.md"].decode()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert set(head.splitlines()) == {
        f"base_model: {licensed}",
        "base_model_relation: quantized",
        "license: other",
        "license_name: modified-mit",
        "license_link: LICENSE",
    }
    assert f"commit `{commit}`" in body
    assert f"kconvert {__import__('kconvert').__version__}" in body
    assert f"    {shlex.join(map(str, ['kconvert', *arguments]))}\n" in body
    assert "int4 group 32 -> bf16, 24 weights: lossless" in body
    assert "32,768 are exactly those that compressed-tensors and torch read from the source" in body
    assert "32,768 values" in body


def test_the_card_of_a_lossy_conversion_states_the_error(hub, remote, command, tmp_path):
    command.ok("convert", remote, tmp_path / "dst", "--to", "fp8", "--push", OUT)
    card = published(hub)["README.md"].decode()
    assert "-> fp8" in card
    assert "lossy" in card
    decibels = float(card.partition("- SQNR ")[2].split()[0])
    assert 25 < decibels < 60


def test_a_card_that_is_no_yaml_costs_the_licence_fields_and_no_more(hub, remote, command, arguments):
    hub.put(remote, {**hub.repos[remote].head(), "README.md": Content(b"---\n[: {\n---\n", is_large=False)})
    command.ok(*arguments)
    assert b"base_model" in published(hub)["README.md"]


def test_nothing_is_to_be_seen_before_the_commit(hub, command, arguments):
    seen = []

    def look(handler):
        seen.append(dict(hub.repos[OUT].head()))
        return False

    hub.fail("/commit/", look, method="POST")
    command.ok(*arguments)
    assert seen == [{}]


def test_a_repository_with_something_in_it_is_refused_before_any_work(hub, command, arguments, tmp_path):
    hub.put(OUT, {"model.safetensors": Content(b"precious", is_large=True), "README.md": Content(b"x", is_large=False)})
    for options in ([], ["--dry-run"]):
        result = command(*arguments, *options)
        assert result.exit_code == 2
        assert f"{OUT} is not empty (model.safetensors)" in result.stderr
    assert not (tmp_path / "dst").exists()
    assert hub.count("", "PUT") == 0


def test_overwrite_replaces_the_checkpoint_and_its_old_shards(hub, command, arguments, whole):
    files = {
        name: Content(b"old", is_large=name.endswith("s")) for name in ("model.safetensors", "config.json", "notes.txt")
    }
    hub.put(OUT, files)
    command.ok(*arguments, "--overwrite")
    assert without_card(published(hub)) == without_card(whole) | {"notes.txt": b"old"}


@pytest.mark.parametrize("call", ["/api/repos/create", "/preupload/", "/objects/batch", "/commit/"])
@pytest.mark.parametrize(
    "fault", [reset, cut(0), status(503), status(429, Retry_After="0")], ids=["reset", "cut", "503", "429"]
)
def test_faults_that_pass_are_waited_out(hub, command, arguments, whole, call, fault):
    hub.fail(call, fault, times=1, method="POST")
    command.ok(*arguments)
    assert without_card(published(hub)) == without_card(whole)
    assert hub.faults[0].times == 0
    assert len(hub.repos[OUT].messages) == 1


def test_a_commit_whose_answer_is_lost_is_made_once(hub, command, arguments):
    hub.fail("/commit/", lambda handler: setattr(handler, "limit", 0), method="POST")
    command.ok(*arguments)
    assert len(hub.repos[OUT].messages) == 1


@pytest.mark.parametrize("options", [(), ("--disk-budget", "20MB")], ids=["kept", "within a budget"])
def test_a_push_that_fails_goes_on_where_it_was(hub, command, arguments, whole, tmp_path, options):
    hub.fail("/lfs/", status(403), times=1000, method="PUT")
    hub.faults.insert(0, type(hub.faults[0])("/lfs/", lambda handler: False, "PUT", 3))
    message = command.refused(*arguments, *options)
    assert OUT in message
    assert "access was refused (403)" in message
    assert not hub.repos[OUT].branches
    sent = set(hub.uploads)
    assert len(sent) == 3
    hub.faults.clear()
    hub.requests.clear()
    command.ok(*arguments, *options)
    assert without_card(published(hub)) == without_card(whole)
    assert not [request for request in hub.requests if request.method == "PUT" and Path(request.path).name in sent]


def test_a_run_that_is_killed_while_it_sends_goes_on_where_it_was(hub, remote, command, whole):
    arguments = ("int4-to-bf16", remote, f"hf://{OUT}", *SHARDS)
    hub.fail("/lfs/", lambda handler: False, times=3, method="PUT")
    hub.fail("/lfs/", hang(10), times=1000, method="PUT")
    with command.start(*arguments) as process:
        wait_for(lambda: hub.faults[1].times < 1000, process)
        process.send_signal(signal.SIGKILL)
    hub.faults.clear()
    hub.requests.clear()
    sent = set(hub.uploads)
    command.ok(*arguments)
    assert without_card(published(hub)) == without_card(whole)
    assert not [request for request in hub.requests if request.method == "PUT" and Path(request.path).name in sent]
    assert len(hub.repos[OUT].messages) == 1


def test_a_commit_that_fails_needs_no_shard_again(hub, command, arguments, whole, tmp_path):
    hub.fail("/commit/", status(403), times=1, method="POST")
    command.refused(*arguments, "--disk-budget", "20MB")
    assert not list((tmp_path / "dst").glob("*.safetensors"))
    hub.requests.clear()
    command.ok(*arguments, "--disk-budget", "20MB")
    assert without_card(published(hub)) == without_card(whole)
    assert hub.count("", "PUT") == 0


def test_a_push_that_is_done_is_not_done_again(hub, command, arguments):
    command.ok(*arguments)
    hub.requests.clear()
    command.ok(*arguments)
    assert hub.count("", "PUT") == hub.count("/commit/", "POST") == 0


@pytest.fixture
def finished(hub, remote, command):
    """A repository that is a DST, and the command that has filled it."""
    arguments = ("int4-to-bf16", remote, f"hf://{OUT}", *SHARDS)
    command.ok(*arguments)
    hub.requests.clear()
    return arguments


@pytest.mark.parametrize(
    "options", [(), ("--disk-budget", "20MB"), ("--dry-run",)], ids=["plain", "within a budget", "dry run"]
)
def test_a_destination_on_the_hub_that_is_done_is_not_done_again(hub, finished, command, int4, options):
    command.ok(*finished, *options)
    assert hub.count(r"resolve/.*\.safetensors$") == len(list(int4.glob("*.safetensors")))  # the headers
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    assert len(hub.repos[OUT].messages) == 1


def test_what_a_run_that_was_killed_after_its_commit_has_left_is_cleared_away(
    hub, remote, command, tmp_path, monkeypatch
):
    from kconvert.run.delivery import Delivery

    arguments = ("int4-to-bf16", remote, f"hf://{OUT}", *SHARDS)
    with monkeypatch.context() as patch:
        patch.setattr(Delivery, "clear", lambda delivery: None)
        command.ok(*arguments)
    assert list((tmp_path / "hf" / "kconvert").iterdir())
    command.ok(*arguments)
    assert not list((tmp_path / "hf" / "kconvert").iterdir())


@pytest.mark.parametrize("change", ["settings", "shard", "missing", "card"])
def test_a_destination_on_the_hub_that_holds_anything_else_is_refused(hub, finished, command, change):
    files = dict(hub.repos[OUT].head())
    first = min(name for name in files if name.endswith(".safetensors"))
    match change:
        case "shard":
            files[first] = Content(files[first].read(0, files[first].size - 1) + b"!", is_large=True)
        case "missing":
            del files["config.json"]
        case "card":
            files["README.md"] = Content(b"mine", is_large=False)
    hub.put(OUT, files)
    arguments = (*finished, "--shard-size", "2MB") if change == "settings" else finished
    assert f"{OUT} is not empty" in command.refused(*arguments)
    command.ok(*arguments, "--overwrite")
    assert without_card(published(hub)).keys() >= {"config.json"}


def test_shards_sent_to_one_repository_are_made_again_for_another(hub, command, remote, whole, tmp_path):
    common = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, "--disk-budget", "20MB", "--push")
    command.ok(*common, OUT)
    command.ok(*common, "me/other")
    assert without_card(published(hub, "me/other")) == without_card(whole)


def test_a_repository_that_may_not_be_written_is_one_sentence(hub, command, arguments, tmp_path):
    hub.fail("/api/repos/create", status(403), times=9, method="POST")
    assert "cannot make the repository, access was refused (403)" in command.refused(*arguments)


@pytest.mark.parametrize("push", ["no id", "./dir", "a"])
def test_a_push_to_what_is_no_repository_is_refused(command, int4, tmp_path, push):
    assert "name it as ORG/NAME" in command.refused("int4-to-bf16", int4, tmp_path / "dst", "--push", push)


def test_two_different_targets_are_refused(hub, command, int4):
    assert "leave out one of them" in command.refused("int4-to-bf16", int4, "hf://a/b", "--push", "c/d")


def test_a_synthetic_sample_can_be_pushed_too(hub, command, tmp_path):
    sizes = {
        "layers": 2,
        "experts": 2,
        "hidden": 64,
        "intermediate": 64,
        "moe-intermediate": 32,
        "vocab": 64,
        "heads": 2,
    }
    options = [f"--{name}={size}" for name, size in {**sizes, "q-rank": 32, "kv-rank": 32}.items()]
    command.ok("sample", tmp_path / "dst", *options, "--push", "me/tiny")
    assert kconvert.inspect("me/tiny").parameters == kconvert.inspect(tmp_path / "dst").parameters
    assert b"Synthetic weights" in published(hub, "me/tiny")["README.md"]
