"""The proof's loops as machine code: kept, damaged, not to be had; and whose modules compile them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kconvert.proof.parity.quick import native
from kconvert.proof.parity.quick.native import Loop


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nothing is kept yet."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(native, "_folder", lambda: folder)
    return folder


def decoded() -> torch.Tensor:
    values = torch.empty(16, dtype=torch.bfloat16)
    codes, scale = torch.arange(8, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16)
    Loop("integers", "decode", "u1* u2* u2* i8 i8")(codes, scale, values, 1, 16)
    return values


def test_a_loop_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decoded()
    assert first[:8].tolist() == [-8, -8, -7, -8, -6, -8, -5, -8]
    (kept,) = folder.glob("*.o")
    monkeypatch.setattr(native, "_compiled", None)
    assert decoded().equal(first)
    assert list(folder.glob("*.o")) == [kept]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-9],
        lambda data: bytes(len(data)),
        lambda data: data[:64] + bytes(536) + data[600:],
    ],
    ids=["empty", "cut off", "zeros", "a part zeros"],
)
def test_what_is_damaged_is_compiled_again(folder: Path, damage: object) -> None:
    first = decoded()
    (kept,) = folder.glob("*.o")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))  # type: ignore[operator]
    assert decoded().equal(first)
    assert kept.read_bytes() == whole


def test_code_that_does_not_load_and_folders_that_take_none_leave_it_to_numba(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = decoded()

    def refuse(loop: Loop, code: bytes) -> int:
        raise RuntimeError("Failed to materialize symbols")

    monkeypatch.setattr(native, "_load", refuse)
    assert decoded().equal(first)
    monkeypatch.setattr(native, "_folder", lambda: folder / "missing")
    assert decoded().equal(first)
    monkeypatch.setattr(native, "_folder", lambda: None)
    assert decoded().equal(first)


def test_a_lock_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    first = decoded()
    (lock,), (kept,) = folder.glob("*.lock"), folder.glob("*.o")
    precious = tmp_path / "precious"
    precious.write_text("kept")
    lock.unlink()
    lock.symlink_to(precious)
    kept.unlink()
    assert decoded().equal(first)
    assert precious.read_text() == "kept"


def test_modules_of_the_folder_that_one_is_in_compile_nothing_and_settings_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numba.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    decoded()
    assert list(folder.glob("*.o"))
    assert not (tmp_path / "ran").exists()


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(native, "LOOPS", tmp_path / "file")
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert native._folder.__wrapped__() is None
