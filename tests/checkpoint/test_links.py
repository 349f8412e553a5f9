"""Symbolic links, and what is no file, in a checkpoint's directory."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import kconvert
from kconvert import KconvertError, Recipe
from kconvert.address import open_checkpoint
from kconvert.cli import main


def refusal(root):
    with pytest.raises(KconvertError) as caught:
        open_checkpoint(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def farm(int4, tmp_path):
    """Links, one by one, to the files and folders of a checkpoint that lies elsewhere."""
    root = tmp_path / "farm"
    root.mkdir()
    for path in int4.iterdir():
        if path.name != ".kconvert":
            (root / path.name).symlink_to(path)
    return root


def move_into_cache(root, repository):
    """As `huggingface-cli download --local-dir` once left it: a folder of links into the cache."""
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(root.iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")


def test_links_into_the_blobs_of_the_hubs_cache_are_followed(int4_copy, tmp_path, tree):
    move_into_cache(int4_copy, tmp_path / "hub" / "models--org--name")
    kconvert.convert(kconvert.plan(int4_copy, Recipe("bf16")), tmp_path / "dst")
    assert kconvert.verify(int4_copy, tmp_path / "dst").faults == ()
    assert not any(path.is_symlink() for path in (tmp_path / "dst").rglob("*"))


@pytest.mark.parametrize("home", ["hub/models--org--name/snapshots", "hub/blobs", "models--org--name"])
def test_other_places_are_not_taken_for_the_hubs_cache(int4_copy, tmp_path, home):
    move_into_cache(int4_copy, tmp_path / home / "x")
    refused = refusal(int4_copy)
    assert "outside the checkpoint" in refused
    assert "--allow-links" in refused


def test_whoever_allows_links_reads_weights_and_side_files_through_them(farm, int4, tmp_path, tree):
    with kconvert.links_allowed():
        kconvert.convert(kconvert.plan(farm, Recipe("bf16")), tmp_path / "dst")
        assert kconvert.verify(farm, tmp_path / "dst").faults == ()
    assert not any(path.is_symlink() for path in (tmp_path / "dst").rglob("*"))
    assert "outside the checkpoint" in refusal(farm)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{farm}"],
        ["int4-to-bf16", "{farm}", "{dst}", "--dry-run"],
        ["convert", "{farm}", "{dst}", "--to", "fp8", "--dry-run"],
        ["verify", "{int4}", "{farm}", "--sample", "0"],
        ["diff", "{farm}", "{int4}", "--headers"],
        ["repack-amx", "{farm}", "{dst}", "--method", "AMXINT4", "--numa", "1", "--dry-run"],
        ["sample", "{dst}", "--from", "{farm}", "--layers", "2", "--dry-run"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_follows_links_when_told_to(farm, int4, tmp_path, arguments):
    words = [word.format(farm=farm, int4=int4, dst=tmp_path / "dst") for word in arguments]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code in (1, 2)
    assert "--allow-links" in refused.stderr
    allowed = CliRunner().invoke(main, [*words, "--allow-links"])
    assert allowed.exit_code == 0, allowed.stderr


@pytest.fixture
def checkpoint(raw, tmp_path):
    return raw.new(tmp_path / "src", {"model.safetensors": {"x": raw.Tensor("U8", [2], b"ab")}}).save()


def test_a_linked_folder_goes_along_with_its_files(checkpoint):
    (checkpoint / "docs").mkdir()
    (checkpoint / "docs" / "guide.md").write_text("hello")
    (checkpoint / "help").symlink_to("docs")
    assert open_checkpoint(checkpoint).side_files == {"docs/guide.md": 5, "help/guide.md": 5}


@pytest.mark.parametrize(
    "links",
    [
        {"circle": "."},
        {"docs/up": ".."},
        {"docs/other": "../help", "help/other": "../docs"},
        {"one": "docs", "two": "docs"},
        {"self": "self"},
        {"one": "two", "two": "one"},
    ],
    ids=str,
)
def test_links_in_a_circle_are_one_sentence(checkpoint, links):
    for name in ("docs", "help"):
        (checkpoint / name).mkdir()
    for name, target in links.items():
        (checkpoint / name).symlink_to(target)
    assert str(checkpoint) in refusal(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_link_that_leads_nowhere_is_a_missing_file(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to("../blobs/abc")
    assert refusal(checkpoint).startswith(f"{checkpoint / name} is missing: it is a symbolic link to")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_by_name(checkpoint, name):
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    assert refusal(checkpoint).startswith(f"{checkpoint / name} is a folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "anything"])
def test_what_is_no_regular_file_is_refused_by_name(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    assert refusal(checkpoint).startswith(f"{checkpoint / name} is neither a file nor a folder")


@pytest.mark.parametrize("name", ["new\nline", "\x1b[31mred", "\udcff.txt"])
def test_a_name_that_cannot_be_printed_is_refused(checkpoint, name):
    (checkpoint / name).write_text("")
    assert repr(name) in refusal(checkpoint)


def test_folders_a_thousand_deep_are_no_matter(checkpoint):
    here = os.open(checkpoint, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    try:
        assert open_checkpoint(checkpoint).tensors.keys() == {"x"}
    finally:
        subprocess.run(["rm", "-r", checkpoint], check=True)  # shutil's way of it recurses


@pytest.mark.parametrize("commit", [b"../../..", b"\xff\xfe", b"", b"/etc", b"a\0b"])
def test_a_reference_of_the_cache_that_leads_outside_is_refused(tmp_path, commit):
    repository = tmp_path / "models--org--name"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_bytes(commit)
    assert "no snapshot of the revision 'main'" in refusal(repository)


def test_a_dangling_link_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org", "name").symlink_to("gone")
    assert "symbolic link" in refusal("org/name")
