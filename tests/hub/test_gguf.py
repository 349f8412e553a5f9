"""GGUF from the Hub and to it, within a disk budget: the same files as from a directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO, OUT = "moonshotai/Tiny-K2", "me/Tiny-K2-GGUF"
SHARDS = ("--shard-size", "400KB")
BUDGET = ("--disk-budget", "20MB")


@pytest.mark.parametrize("options", [(), BUDGET], ids=["free", "within a budget"])
def test_from_the_hub_it_is_what_it_is_from_a_directory(
    hub: Any,
    command: Any,
    int4: Path,
    tmp_path: Path,
    tree: Callable[[Path], dict[str, bytes]],
    options: tuple[str, ...],
) -> None:
    hub.add(REPO, int4)
    local = shutil.copytree(int4, tmp_path / "Tiny-K2", ignore=shutil.ignore_patterns(".kconvert"))
    command.ok("convert", local, tmp_path / "local", "--to", "gguf", *SHARDS)
    command.ok("convert", REPO, tmp_path / "out", "--to", "gguf", *SHARDS, *options)
    written = tree(tmp_path / "out")
    assert written == tree(tmp_path / "local")
    assert all(name.startswith("Tiny-K2-0") and name.endswith(".gguf") for name in written)


@pytest.mark.parametrize("options", [(), BUDGET], ids=["kept", "within a budget"])
def test_it_goes_to_the_hub_whole_and_once(
    hub: Any,
    command: Any,
    int4: Path,
    tmp_path: Path,
    tree: Callable[[Path], dict[str, bytes]],
    options: tuple[str, ...],
) -> None:
    hub.add(REPO, int4)
    command.ok("convert", REPO, tmp_path / "local", "--to", "gguf", *SHARDS)
    arguments = ("convert", REPO, tmp_path / "out", "--to", "gguf", *SHARDS, "--push", OUT, *options)
    command.ok(*arguments)
    sent = {name: content.read(0, content.size) for name, content in hub.repos[OUT].head().items()}
    sent.pop("README.md")
    assert sent == tree(tmp_path / "local")
    command.ok(*arguments)
    assert len(hub.repos[OUT].messages) == 1
