"""Looking at a repository without downloading it."""

import json

import pytest

from kconvert.proof import processes

from .server import Content

INDEX = "model.safetensors.index.json"
DRY = ("int4-to-bf16", "--dry-run", "--json")


def test_inspect_says_of_a_repository_what_it_says_of_its_copy(remote, command, int4):
    here, there = (json.loads(command.ok("inspect", source, "--json")) for source in (int4, remote))
    assert there.pop("name").startswith(f"{remote}@")
    here.pop("name")
    for found in (here, there):
        found["side_files"].sort()
    assert there == here


def test_inspect_and_dry_run_fetch_headers_and_no_weights(hub, remote, command, int4, tmp_path):
    shards = list(int4.glob("*.safetensors"))
    weights = sum(path.stat().st_size for path in shards)
    for arguments in (["inspect", remote], [DRY[0], remote, tmp_path / "dst", *DRY[1:]]):
        hub.requests.clear()
        command.ok(*arguments)
        assert hub.sent(r"\.safetensors$") <= len(shards) * (1 << 16) < weights / 2
        assert hub.count(r"\.safetensors$") == len(shards)
        assert hub.count("index.json") == hub.count("index.json", "HEAD") == 0
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(("share", "requests"), [(1.0, 1), (0.1, 2)], ids=["enough", "too little"])
def test_the_size_of_the_index_tells_how_much_to_ask_for_at_first(
    hub, remote, command, int4, monkeypatch, share, requests
):
    from kconvert.checkpoint import remote as reading

    sizes = [8 + int.from_bytes(path.open("rb").read(8), "little") for path in int4.glob("*.safetensors")]
    longest = max(sizes) / ((int4 / INDEX).stat().st_size / len(sizes))
    monkeypatch.setattr(reading, "FIRST_READ", (64, 1 << 20))
    monkeypatch.setattr(reading, "HEADER_TO_INDEX", share * longest + 0.01)
    command.ok("inspect", remote)
    assert hub.count(r"\.safetensors$") == requests * len(sizes)
    assert hub.sent(r"\.safetensors$") < 1.1 * len(sizes) * max(sizes)


def test_a_dry_run_says_what_comes_what_goes_and_the_smallest_budget(remote, command, int4, tmp_path):
    arguments = ("int4-to-bf16", remote, "hf://me/out", "--shard-size", "500kB", "--disk-budget", "1GB")
    plan = json.loads(command.ok(*arguments, "--dry-run", "--json"))
    assert plan["download_bytes"] == sum(path.stat().st_size for path in int4.glob("*.safetensors"))
    assert plan["push"] == "me/out"
    assert plan["output_bytes"] > plan["smallest_disk_budget"] > 0
    text = command.ok("int4-to-bf16", remote, tmp_path / "dst", "--dry-run")
    assert "download: " in text
    assert "the smallest possible is" in text
    assert "at 1 Gbit/s" in text


def test_the_commit_is_asked_for_once_and_named_ever_after(hub, remote, command):
    commit = hub.repos[remote].branches["main"]
    assert command.ok("inspect", remote).startswith(f"{remote}@{commit}: ")
    first, *rest = (request.path for request in hub.requests)
    assert first == f"/api/models/{remote}"
    assert len(rest) > 5
    assert all(commit in path for path in rest)


def test_a_branch_that_moves_while_it_is_read_changes_nothing(hub, remote, command, int4):
    before = command.ok("inspect", remote, "--json")

    def move(handler):
        hub.put(remote, {"config.json": Content(b"{}", is_large=False)})
        return False

    hub.fail("/tree/", move)
    assert command.ok("inspect", remote, "--json") == before


def test_a_second_look_takes_config_and_index_from_the_clients_cache(hub, remote, command):
    command.ok("inspect", remote)
    hub.requests.clear()
    command.ok("inspect", remote)
    assert hub.count(r"\.json$") == 0


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a\\..\\b", "a//b", "./a", "a\0b", "a\nb"])
def test_a_file_name_that_could_lead_elsewhere_is_refused(hub, remote, command, name, tmp_path):
    files = {**hub.repos[remote].head(), name: Content(b"x", is_large=False)}
    hub.put(remote, files)
    message = command.refused("int4-to-bf16", remote, tmp_path / "home" / "dst")
    assert "do not trust this repository" in message
    assert repr(name) in message
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


@pytest.fixture
def misled(hub, remote):
    """The repository with an index that a function has changed."""

    def mislead(change):
        files = dict(hub.repos[remote].head())
        index = json.loads(files[INDEX].read(0, 1 << 30))
        change(index["weight_map"])
        hub.put(remote, files | {INDEX: Content(json.dumps(index).encode(), is_large=False)})
        return remote

    return mislead


def move_one(weight_map):
    name, file = next(iter(weight_map.items()))
    weight_map[name] = next(other for other in weight_map.values() if other != file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight_map: weight_map.update(x="../../x.safetensors"), "outside the checkpoint"),
        (lambda weight_map: weight_map.update(ghost=next(iter(weight_map.values()))), "but not in the file"),
        (lambda weight_map: weight_map.pop(next(iter(weight_map))), "does not name it"),
        (move_one, "places it in"),
    ],
    ids=["outside", "ghost", "unnamed", "moved"],
)
def test_an_index_that_disagrees_is_refused_before_anything_is_written(misled, command, int4, tmp_path, change, words):
    source = misled(change)
    assert words in command.refused("int4-to-bf16", source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert words in command.refused("verify", source, int4)
    assert words in command.refused("diff", int4, source)
    result = command("verify", int4, source)
    assert result.exit_code == 1
    assert words in result.stderr


def test_the_index_decides_where_a_repository_holds_other_safetensors_files(hub, remote, command):
    before = json.loads(command.ok("inspect", remote, "--json"))
    hub.put(remote, hub.repos[remote].head() | {"consolidated.safetensors": Content(b"not looked at", is_large=True)})
    hub.requests.clear()
    found = json.loads(command.ok("inspect", remote, "--json"))
    assert (found["parameters"], found["tensors"]) == (before["parameters"], before["tensors"])
    assert hub.count("consolidated") == 0
    assert hub.count(INDEX) == 1


def test_a_shard_that_a_repository_lacks_is_named(hub, remote, command):
    files = dict(hub.repos[remote].head())
    last = max(name for name in files if name.endswith(".safetensors"))
    del files[last]
    hub.put(remote, files)
    assert f"{last} is missing" in command.refused("inspect", remote)


def test_a_tensor_in_two_shards_is_refused_by_name(hub, raw, command, int4_copy):
    checkpoint = raw.load(int4_copy)
    name, tensor = next((name, checkpoint[name]) for name in checkpoint)
    checkpoint.put(name, tensor, max(checkpoint.files))
    hub.add("org/twice", checkpoint.save())
    assert repr(name) in command.refused("inspect", "org/twice")


def test_shards_without_an_index_are_refused(hub, remote, command):
    hub.put(remote, {name: content for name, content in hub.repos[remote].head().items() if name != INDEX})
    assert f"safetensors files but no {INDEX}" in command.refused("inspect", remote)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_model.safetensors"], "holds an adapter, no model"),
        (["name-w4g128/model.safetensors"], "holds its checkpoint in the folder name-w4g128"),
        (["model-Q4_K_M.gguf"], "GGUF files, which are not converted"),
    ],
)
def test_a_repository_without_a_model_is_said_to_be_what_it_is(hub, remote, command, files, words):
    hub.put(remote, {name: Content(b"{}", is_large=False) for name in files})
    assert words in command.refused("inspect", remote)


def test_the_files_of_hidden_directories_are_no_content(hub, remote, command):
    before = json.loads(command.ok("inspect", remote, "--json"))["side_files"]
    hub.put(remote, {**hub.repos[remote].head(), ".kconvert/journal.jsonl": Content(b"{}", is_large=False)})
    assert json.loads(command.ok("inspect", remote, "--json"))["side_files"] == before


@pytest.mark.parametrize("flaw", ["header", "truncated"])
def test_a_damaged_shard_is_named_with_its_repository(hub, remote, command, flaw):
    files = dict(hub.repos[remote].head())
    name = next(name for name in files if name.endswith(".safetensors"))
    data = files[name].read(0, 1 << 30)
    files[name] = Content(data[:8] + b"x" + data[9:] if flaw == "header" else data[:-1], is_large=True)
    commit = hub.put(remote, files)
    message = command.refused("inspect", remote)
    assert message.startswith(f"error: {remote}@{commit}/{name}")


@pytest.mark.parametrize("share", [processes.SHARE, 1], ids=["alone", "in several processes"])
def test_verify_takes_a_repository_on_either_side(hub, remote, command, int4, bf16, monkeypatch, share):
    """Several processes have connections of their own."""
    monkeypatch.setattr(processes, "SHARE", share)
    hub.add("me/bf16", bf16)
    assert command.ok("verify", remote, "me/bf16", "--sample", 0.1).startswith("verified: ")
    damaged = dict(hub.repos["me/bf16"].head())
    name = next(name for name in damaged if name.endswith(".safetensors"))
    data = damaged[name].read(0, 1 << 30)
    damaged[name] = Content(data[:-1] + bytes([data[-1] ^ 64]), is_large=True)
    hub.put("me/bf16", damaged)
    result = command("verify", int4, "me/bf16")
    assert result.exit_code == 1
    assert "differs" in result.stderr


def test_a_quantisation_that_only_a_file_beside_config_json_declares_is_read(hub, command, int4_copy):
    path = int4_copy / "config.json"
    config = json.loads(path.read_text())
    (int4_copy / "quantization_config.json").write_text(json.dumps(config.pop("quantization_config")))
    path.write_text(json.dumps(config))
    hub.add("org/beside", int4_copy)
    here, there = (json.loads(command.ok("inspect", source, "--json")) for source in (int4_copy, "org/beside"))
    assert here["schemes"] == there["schemes"] == ["pack-quantized int4 group 32"]
    assert here["roles"] == there["roles"]
