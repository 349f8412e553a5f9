"""A conversion of a repository of the Hub."""

SHARDS = ("--shard-size", "1MB")


def test_a_conversion_from_the_hub_writes_the_bytes_of_a_local_one(hub, remote, command, whole, tree, tmp_path):
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole


def test_within_a_budget_source_files_leave_the_disk(hub, remote, command, whole, tree, tmp_path):
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, "--disk-budget", "20MB")
    assert tree(tmp_path / "dst") == whole
    assert not (tmp_path / "dst" / ".kconvert" / "source").exists()


def test_push(hub, remote, command, whole, tree, tmp_path):
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, "--push", "me/Tiny-K2-BF16")
    print(hub.repos["me/Tiny-K2-BF16"].head()["README.md"].data.decode())
