"""Miniatures cut out of a repository of the Hub."""

import pytest

CUT = ("--layers", 2, "--experts", 2)


@pytest.fixture
def cut_here(int4, command, tmp_path, tree):
    """The same cut out of the local checkpoint."""
    command.ok("sample", tmp_path / "here", "--from", int4, *CUT)
    return tree(tmp_path / "here")


@pytest.mark.parametrize("options", [(), ("--disk-budget", "20MB")], ids=["free", "within a budget"])
def test_a_cut_of_a_repository_is_the_cut_of_its_copy(remote, command, cut_here, tree, tmp_path, options):
    command.ok("sample", tmp_path / "there", "--from", remote, *CUT, *options)
    assert tree(tmp_path / "there") == cut_here
    assert not (tmp_path / "there" / ".kconvert" / "source").exists()


def test_only_the_ranges_of_its_tensors_are_fetched(hub, command, sample, tmp_path, tree, monkeypatch):
    from kconvert.run import fetches

    monkeypatch.setattr(fetches, "GAP", 4096)
    source = sample(tmp_path / "source", shard_size=3_000_000, experts=24, layers=4)
    hub.add("org/model", source)
    command.ok("inspect", "org/model")
    hub.requests.clear()
    command.ok("sample", tmp_path / "dst", "--from", "org/model", *CUT)
    size = sum(path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors"))
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    shards = len(list(source.glob("*.safetensors")))
    assert size * 3 < total
    assert hub.sent(r"\.safetensors$") < size * 1.2 + shards * (1 << 16)
    command.ok("sample", tmp_path / "here", "--from", source, *CUT)
    assert tree(tmp_path / "dst") == tree(tmp_path / "here")


def test_a_revision_can_be_named(hub, remote, command, tmp_path):
    commit = hub.repos[remote].branches["main"]
    command.ok("sample", tmp_path / "dst", "--from", f"hf://{remote}@{commit[:40]}", *CUT)
    assert f"{remote}@{commit}" in (tmp_path / "dst" / ".kconvert" / "journal.jsonl").read_text()
