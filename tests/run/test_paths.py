"""Paths that the system refuses: each command says so in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import kconvert
from kconvert import KconvertError, Recipe
from kconvert.run.delivery import Delivery

READING = {
    "inspect": ["inspect", "{path}"],
    "convert": ["int4-to-bf16", "{path}", "{dst}"],
    "dry run": ["int4-to-bf16", "{path}", "{dst}", "--dry-run"],
    "verify": ["verify", "{path}", "{int4}"],
    "verify output": ["verify", "{int4}", "{path}"],
    "diff": ["diff", "{path}", "{int4}"],
    "diff after": ["diff", "{int4}", "{path}"],
    "repack-amx": ["repack-amx", "{path}", "{dst}", "--method", "AMXINT4", "--numa", "1"],
    "from-amx": ["repack-amx", "{dst}", "--from-amx", "{path}", "--numa", "1"],
    "sample": ["sample", "{dst}", "--from", "{path}"],
    "qat": ["qat", "train", "--model", "{path}", "--text", "{text}", "--steps", "1", "--output", "{dst}"],
}
WRITING = {
    "convert": ["int4-to-bf16", "{int4}", "{path}"],
    "dry run": ["int4-to-bf16", "{int4}", "{path}", "--dry-run"],
    "repack-amx": ["repack-amx", "{int4}", "{path}", "--method", "AMXINT4", "--numa", "1"],
    "sample": ["sample", "{path}"],
}
Command = Callable[..., Result]


def too_long(home: Path) -> Path:
    return home / ("x" * 256)


def too_deep(home: Path) -> Path:
    return home.joinpath(*["d" * 200] * 25)


def circle(home: Path) -> Path:
    (home / "circle").symlink_to("circle")
    return home / "circle"


def two_in_a_circle(home: Path) -> Path:
    (home / "one").symlink_to("two")
    (home / "two").symlink_to("one")
    return home / "one" / "model"


def nowhere(home: Path) -> Path:
    (home / "link").symlink_to("gone")
    return home / "link"


PLACES = [too_long, too_deep, circle, two_in_a_circle, nowhere]


@pytest.fixture
def fill(int4: Path, tmp_path: Path) -> Callable[[list[str], Path], list[str]]:
    """Arguments with the paths of this test in their places."""
    (tmp_path / "text.txt").write_text("text")

    def with_path(arguments: list[str], path: Path) -> list[str]:
        places = {"path": path, "int4": int4, "dst": tmp_path / "dst", "text": tmp_path / "text.txt"}
        return [argument.format(**places) for argument in arguments]

    return with_path


def check_sentence(code: int, stderr: str) -> None:
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    assert "Errno" not in stderr


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "arguments", [*READING.values(), *WRITING.values()], ids=[*READING, *(f"to {w}" for w in WRITING)]
)
def test_a_path_that_the_system_refuses_is_one_sentence(
    command: Command,
    fill: Callable[..., list[str]],
    tmp_path: Path,
    arguments: list[str],
    place: Callable[[Path], Path],
) -> None:
    result = command(*fill(arguments, place(tmp_path)))
    check_sentence(result.exit_code, result.stderr)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("place", PLACES)
def test_the_functions_say_the_same(int4: Path, tmp_path: Path, place: Callable[[Path], Path]) -> None:
    path = place(tmp_path)
    plan = kconvert.plan(int4, Recipe("bf16"))
    for call in (
        lambda: kconvert.inspect(path),
        lambda: kconvert.verify(path, int4),
        lambda: kconvert.verify(int4, path),
        lambda: kconvert.check(plan, path),
        lambda: kconvert.convert(plan, path),
        lambda: kconvert.pinned(int4, path),
        lambda: Delivery.to(path),
    ):
        with pytest.raises(KconvertError, match=r"cannot look at|where nothing is"):
            call()


@pytest.mark.parametrize("path", ["", "a\0b", "no/such/directory", "x" * 5000])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(KconvertError):
        kconvert.inspect(path)


@pytest.fixture
def as_owner_only() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command under the permissions that files have, which root may otherwise pass over."""
    if os.geteuid() and not shutil.which("setpriv"):
        pytest.skip("root without setpriv may read everything")
    prefix = [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        script = "from kconvert.cli import main; main()"
        words = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(words, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)

    return run


@pytest.mark.parametrize("closed", [".", "docs", "docs/deep", "config.json", "tokenizer_config.json"])
def test_what_one_may_not_read_is_said_before_anything_is_written(
    as_owner_only: Callable[..., subprocess.CompletedProcess[str]], int4_copy: Path, tmp_path: Path, closed: str
) -> None:
    (int4_copy / "docs" / "deep").mkdir(parents=True)
    (int4_copy / "docs" / "deep" / "guide.md").write_text("hello")
    (int4_copy / closed).chmod(0)
    try:
        done = as_owner_only("int4-to-bf16", int4_copy, tmp_path / "dst")
    finally:
        (int4_copy / closed).chmod(0o755)
    check_sentence(done.returncode, done.stderr)
    assert str(int4_copy / closed) in done.stderr
    assert "check the permissions" in done.stderr
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "command", sorted(READING.keys() - {"qat"})
)  # which takes long to start, and asks in the same way
def test_a_directory_below_one_that_is_closed_is_one_sentence(
    as_owner_only: Callable[..., subprocess.CompletedProcess[str]],
    fill: Callable[..., list[str]],
    tmp_path: Path,
    command: str,
) -> None:
    closed = tmp_path / "closed"
    (closed / "model").mkdir(parents=True)
    closed.chmod(0)
    try:
        done = as_owner_only(*fill(READING[command], closed / "model"))
    finally:
        closed.chmod(0o755)
    check_sentence(done.returncode, done.stderr)
    assert "check the permissions" in done.stderr


def test_a_side_file_with_the_longest_name_in_a_folder_with_the_longest_name_goes_along(
    int4_copy: Path, tmp_path: Path, command: Command
) -> None:
    name = Path("ü" * 127, "ü" * 125 + ".txt")
    (int4_copy / name).parent.mkdir()
    (int4_copy / name).write_text("hello")
    assert command("int4-to-bf16", int4_copy, tmp_path / "dst").exit_code == 0
    assert (tmp_path / "dst" / name).read_text() == "hello"
