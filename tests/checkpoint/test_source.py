import json
import os
import re

import pytest

from kconvert import KconvertError
from kconvert.address import open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(raw, tmp_path):
    """Three tensors in two files, with an index and a config."""
    one, two = raw.Tensor("U8", [2], b"ab"), raw.Tensor("U8", [1, 3], b"cde")
    files = {"a.safetensors": {"x": one, "y": two}, "b.safetensors": {"z": one}}
    return raw.new(tmp_path / "src", files, {"model_type": "other"})


def rewrite_index(root, change):
    index = json.loads((root / INDEX).read_text())
    change(index["weight_map"])
    (root / INDEX).write_text(json.dumps(index))


def refusal(root, **options):
    with pytest.raises(KconvertError) as caught:
        open_checkpoint(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_is_found_by_name_with_file_and_byte_range(checkpoint):
    found = open_checkpoint(checkpoint.save())
    assert {t.name: (t.file, t.dtype, t.shape, t.nbytes) for t in found.tensors.values()} == {
        "x": ("a.safetensors", "U8", (2,), 2),
        "y": ("a.safetensors", "U8", (1, 3), 3),
        "z": ("b.safetensors", "U8", (2,), 2),
    }
    with found.reader() as reader:
        assert {n: reader.read(t.file, t.start, t.nbytes) for n, t in found.tensors.items()} == {
            name: checkpoint[name].data for name in checkpoint
        }
    assert found.nbytes == 7
    assert found.config == {"model_type": "other"}


def test_a_lone_file_needs_no_index(checkpoint):
    del checkpoint.files["b.safetensors"]
    (checkpoint.save() / INDEX).unlink()
    assert open_checkpoint(checkpoint.root).tensors.keys() == {"x", "y"}


def test_several_files_without_an_index_are_refused(checkpoint):
    (checkpoint.save() / INDEX).unlink()
    assert f"2 safetensors files but no {INDEX}" in refusal(checkpoint.root)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    assert "holds no safetensors files" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["file", "nothing"])
def test_what_is_no_directory_is_refused(tmp_path, kind):
    if kind == "file":
        (tmp_path / "src").write_text("")
    assert "is not a directory" in refusal(tmp_path / "src")


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../a.safetensors", "docs/../../a.safetensors", "a\0b", 7, None, ["a"]]
)
def test_an_index_entry_that_leads_outside_is_refused_by_name(checkpoint, place):
    root = checkpoint.save()
    rewrite_index(root, lambda weight_map: weight_map.update(y=place))
    message = refusal(root)
    assert message.startswith(f"{root / INDEX}: tensor 'y'")
    assert repr(place) in message


def test_a_shard_that_the_index_names_and_the_disk_lacks_is_refused_by_name(checkpoint):
    (checkpoint.save() / "b.safetensors").unlink()
    message = refusal(checkpoint.root)
    assert message.startswith(f"{checkpoint.root / 'b.safetensors'} is missing")
    assert "'z'" in message


def test_a_tensor_of_the_index_that_no_file_holds_is_refused_by_name(checkpoint):
    rewrite_index(checkpoint.save(), lambda weight_map: weight_map.update(ghost="b.safetensors"))
    assert refusal(checkpoint.root).startswith(f"{checkpoint.root / 'b.safetensors'}: tensor 'ghost'")


def test_a_tensor_that_the_index_does_not_name_is_refused_by_name(checkpoint):
    rewrite_index(checkpoint.save(), lambda weight_map: weight_map.pop("y"))
    message = refusal(checkpoint.root)
    assert message.startswith(f"{checkpoint.root / 'a.safetensors'}: tensor 'y'")
    assert "does not name it" in message


def test_a_tensor_in_another_file_than_the_index_says_is_refused_by_name(checkpoint):
    rewrite_index(checkpoint.save(), lambda weight_map: weight_map.update(y="b.safetensors"))
    message = refusal(checkpoint.root)
    assert message.startswith(f"{checkpoint.root / 'a.safetensors'}: tensor 'y'")
    assert "places it in b.safetensors" in message


def test_a_tensor_in_two_files_is_refused_by_name(checkpoint, raw):
    checkpoint.put("x", raw.Tensor("U8", [2], b"zz"), "b.safetensors")
    assert "tensor 'x'" in refusal(checkpoint.save())


@pytest.mark.parametrize("file", [INDEX, "config.json"])
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "is not a JSON object"),
    ],
)
def test_a_damaged_json_file_is_refused_by_name(checkpoint, file, text, fault):
    (checkpoint.save() / file).write_bytes(text)
    assert refusal(checkpoint.root).startswith(f"{checkpoint.root / file} {fault}")


@pytest.mark.parametrize("table", [{}, {"weight_map": {}}, {"weight_map": ["a.safetensors"]}])
def test_an_index_without_a_weight_map_is_refused(checkpoint, table):
    (checkpoint.save() / INDEX).write_text(json.dumps(table))
    assert refusal(checkpoint.root).startswith(f"{checkpoint.root / INDEX} has no weight_map")


def test_a_missing_config_is_an_empty_one(checkpoint):
    (checkpoint.save() / "config.json").unlink()
    assert open_checkpoint(checkpoint.root).config == {}


def test_a_truncated_shard_is_refused_by_name(checkpoint):
    path = checkpoint.save() / "b.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert refusal(checkpoint.root).startswith(f"{path} is truncated")


SIDE_FILES = [
    "README.md",
    "tokenizer_config.json",
    "tiktoken.model",
    "docs/guide.md",
    "docs/deep/er.md",
    "figures/a.png",
]
OTHERS = ["pytorch_model.bin", "pytorch_model.bin.index.json", "old/extra.safetensors", "model.gguf", "onnx/model.onnx"]
HIDDEN = [".git/HEAD", ".kconvert/journal.jsonl", ".cache/huggingface/x.metadata"]


@pytest.fixture
def furnished(checkpoint):
    root = checkpoint.save()
    for name in (*SIDE_FILES, *OTHERS, *HIDDEN):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return open_checkpoint(root)


def test_side_files_are_all_found_however_deep(furnished):
    assert furnished.side_files == {name: len(name) for name in SIDE_FILES}


def test_weights_in_files_that_the_checkpoint_does_not_name_are_left_out_and_said_so(furnished):
    assert sorted(furnished.left_out) == sorted(OTHERS)


@pytest.fixture
def snapshot(checkpoint, tmp_path):
    """The same checkpoint as the Hub's client caches it: a repository whose snapshot links to blobs."""
    repo = tmp_path / "hub" / "models--moonshotai--Kimi-K2-Thinking"
    folder = repo / "snapshots" / "abc123"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    checkpoint.save()
    (checkpoint.root / "docs").mkdir()
    (checkpoint.root / "docs" / "guide.md").write_text("hello")
    for number, path in enumerate(sorted(p for p in checkpoint.root.rglob("*") if p.is_file())):
        name = path.relative_to(checkpoint.root)
        path.rename(repo / "blobs" / f"{number:064x}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        depth = len(name.parts) + 1
        (folder / name).symlink_to("/".join([".."] * depth) + f"/blobs/{number:064x}")
    return folder


def test_a_hub_cache_snapshot_is_read_through_its_links(snapshot, checkpoint):
    found = open_checkpoint(snapshot)
    assert found.name == "moonshotai/Kimi-K2-Thinking@abc123"
    assert found.side_files == {"docs/guide.md": 5}
    with found.reader() as reader:
        assert {n: reader.read(t.file, t.start, t.nbytes) for n, t in found.tensors.items()} == {
            name: checkpoint[name].data for name in checkpoint
        }


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_a_hub_cache_repository_stands_for_the_snapshot_of_a_revision(snapshot, revision):
    assert open_checkpoint(snapshot.parents[1], revision).root == snapshot


@pytest.mark.parametrize("revision", ["v9", "..", "../snapshots/abc123", "/etc"])
def test_a_revision_that_is_not_in_the_cache_is_refused(snapshot, revision):
    assert f"no snapshot of the revision {revision!r}" in refusal(snapshot.parents[1], revision=revision)


def test_a_revision_of_a_plain_directory_is_refused(checkpoint):
    assert "leave out --revision" in refusal(checkpoint.save(), revision="main")


def test_a_snapshot_named_through_a_trailing_dot_and_slash_keeps_its_name(snapshot):
    assert open_checkpoint(f"{snapshot}/docs/..").name == "moonshotai/Kimi-K2-Thinking@abc123"


@pytest.mark.parametrize("name", ["b.safetensors", "README.md", "docs/secret", "docs"])
@pytest.mark.parametrize("layout", ["plain", "snapshot"])
def test_a_link_that_leads_outside_is_refused_by_name(checkpoint, tmp_path, layout, name, request):
    root = request.getfixturevalue("snapshot") if layout == "snapshot" else checkpoint.save()
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    link = root / name
    if link.is_dir():
        (link / "guide.md").unlink()
        link.rmdir()
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside if name == "docs" else outside / "secret")
    assert re.match(f"{re.escape(str(link))} is a symbolic link to {re.escape(str(outside))}", refusal(root))


def test_a_dangling_link_in_the_place_of_a_shard_is_refused_by_name(checkpoint):
    shard = checkpoint.save() / "b.safetensors"
    shard.rename(shard.with_suffix(".moved"))
    shard.symlink_to("gone")
    assert refusal(checkpoint.root).startswith(f"{shard} is missing")


def test_a_linked_checkpoint_directory_is_followed(checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(checkpoint.save())
    assert open_checkpoint(tmp_path / "link").tensors.keys() == {"x", "y", "z"}


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 100_000])
@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 8191])
def test_bulk_reads_past_the_page_cache_give_the_same_bytes(checkpoint, raw, start, nbytes):
    data = os.urandom(120_000)
    checkpoint.files = {"a.safetensors": {"x": raw.Tensor("U8", [len(data)], data)}}
    found = open_checkpoint(checkpoint.save())
    first = found.tensors["x"].start + start
    room = memoryview(bytearray(nbytes + 4 * 4096))  # unaligned: the filesystem may refuse, the reader must not
    with found.reader() as reader:
        assert bytes(reader.fetch("a.safetensors", first, nbytes, room)) == data[start : start + nbytes]


def test_a_file_that_shrank_is_named_with_the_place_where_it_ends(checkpoint):
    found = open_checkpoint(checkpoint.save())
    path = checkpoint.root / "a.safetensors"
    os.truncate(path, found.tensors["y"].start + 1)
    with found.reader() as reader, pytest.raises(KconvertError, match=re.escape(f"{path} ends at byte")):
        reader.read("a.safetensors", found.tensors["y"].start, 3)
