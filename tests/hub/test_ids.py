"""What is a directory and what a repository of the Hub."""

import pytest

from kconvert.hub.ids import HubId, parse_destination, parse_hub_id


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("moonshotai/Kimi-K2-Thinking", "moonshotai/Kimi-K2-Thinking", None),
        ("hf://moonshotai/Kimi-K2-Thinking", "moonshotai/Kimi-K2-Thinking", None),
        ("hf://a/b@main", "a/b", "main"),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ("zai-org/GLM-4.5", "zai-org/GLM-4.5", None),
    ],
)
def test_ids_are_written_as_the_hub_writes_them(text, repo, revision):
    assert parse_hub_id(text) == HubId(repo, revision)


@pytest.mark.parametrize(
    "text",
    ["a", "a/b/c", "./a/b", "/a/b", "../b", "a/..", "a/b@", "a/b@x y", "hf://a", "a/.b", "a/b..c", "a--b/c", "", "~/a"],
)
def test_paths_are_no_ids(text):
    assert parse_hub_id(text) is None


def test_a_destination_in_an_existing_directory_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_destination("out/model") == HubId("out/model")
    (tmp_path / "out").mkdir()
    assert parse_destination("out/model") is None
    assert parse_destination("hf://out/model") == HubId("out/model")


def test_an_existing_directory_wins_over_a_repository_of_that_name(hub, remote, command, int4, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / remote).parent.mkdir()
    (tmp_path / remote).symlink_to(int4)
    assert "@" not in command.ok("inspect", remote).splitlines()[0]
    assert hub.requests == []
    assert command.ok("inspect", f"hf://{remote}").startswith(f"{remote}@")


def test_a_revision_said_twice_is_the_one_of_the_option(hub, remote, command, int4_copy):
    (int4_copy / "README.md").write_text("new")
    hub.add(remote, int4_copy, "v2")
    old, new = (hub.repos[remote].branches[name] for name in ("main", "v2"))
    assert command.ok("inspect", f"{remote}@v2").startswith(f"{remote}@{new}")
    assert command.ok("inspect", f"{remote}@v2", "--revision", "main").startswith(f"{remote}@{old}")
    assert command.ok("inspect", remote, "--revision", old).startswith(f"{remote}@{old}")
