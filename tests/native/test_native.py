"""Loops as machine code: kept, damaged, not to be had; whose modules compile them; and that they need nothing of numba's."""

from __future__ import annotations

import errno
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from kconvert import native
from kconvert.errors import KconvertError
from kconvert.formats.kernels import PACKAGE, Kernels
from kconvert.native.base import write
from kconvert.proof.parity.quick.native import LOOPS, Loop


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nothing is kept yet."""
    folder = tmp_path / "kept"
    folder.mkdir()
    put(monkeypatch, folder)
    return folder


def put(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    for package in (LOOPS, PACKAGE):
        monkeypatch.setitem(package.__dict__, "folder", folder)


def decoded() -> torch.Tensor:
    values = torch.empty(16, dtype=torch.bfloat16)
    codes, scale = torch.arange(8, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16)
    Loop("integers", "decode", "u1* u2* u2* i8 i8")(codes, scale, values, 1, 16)
    return values


def refuse(*_: object) -> None:
    raise RuntimeError("Failed to materialize symbols")


def test_a_loop_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decoded()
    assert first[:8].tolist() == [-8, -8, -7, -8, -6, -8, -5, -8]
    (kept,) = folder.glob("*.o")
    monkeypatch.setattr(native, "_let_keep", None)
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
    monkeypatch.setattr(native, "_load", refuse)
    assert decoded().equal(first)
    put(monkeypatch, folder / "missing")
    assert decoded().equal(first)
    put(monkeypatch, None)
    assert decoded().equal(first)


def killed(by: int) -> object:
    return lambda code: ["sh", "-c", f"echo LLVM ERROR: no such instruction >&2; kill -{by} $$"]


def test_a_compiler_that_crashes_is_told_in_a_sentence_and_not_run_again_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "python", killed(by=signal.SIGABRT))
    with pytest.raises(KconvertError, match=r"integers\.decode .*\(signal 6: LLVM ERROR: no such instruction\)"):
        decoded()


def test_a_compiler_that_ctrl_c_ends_has_not_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "python", killed(by=signal.SIGINT))
    assert decoded()[0] == -8


def test_what_could_not_be_kept_leaves_no_part_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write(folder / "loop.o", b"code")
    assert not list(folder.iterdir())


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
    (tmp_path / "file").touch()
    package = native.Package("kconvert.formats.kernels")
    monkeypatch.setitem(package.__dict__, "_home", tmp_path / "file")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert package.folder is None


@pytest.mark.parametrize("left", [None, ModuleSpec("numba", None)])  # the latter where caches in its folder are left
def test_a_python_without_numba_is_told_in_a_sentence(
    folder: Path, left: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(LOOPS.__dict__, "_about", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: left)
    with pytest.raises(KconvertError, match=r"numba is not installed in .*`pip install numba`"):
        decoded()


def test_what_compiled_for_another_processor_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded()
    monkeypatch.delitem(LOOPS.__dict__, "_about", raising=False)
    monkeypatch.setattr(native, "features", lambda: "+fma")
    decoded()
    assert len(list(folder.glob("*.o"))) == 2


def test_two_threads_that_need_a_kernel_at_once_compile_it_once(folder: Path) -> None:
    tiles = [np.full(9, number, np.float32) for number in range(4)]
    outs = [np.empty(9, np.uint16) for _ in tiles]
    threads = [Thread(target=Kernels("dense").encode_bf16, args=arrays) for arrays in zip(tiles, outs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [out[8] for out in outs] == [0, 0x3F80, 0x4000, 0x4040]
    assert len(list(folder.glob("*.o"))) == 1


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("step", [1, 3, -1])
def test_arrays_at_any_address_and_with_any_strides_are_what_numpy_says_they_are(offset: int, step: int) -> None:
    whole = np.random.default_rng(0).standard_normal(60).astype("f4").view("u4") >> 16
    memory = np.zeros(121, np.uint8)
    bits = memory[offset : offset + 120].view("u2")
    bits[:] = whole
    out = np.zeros((20, 2), np.float32)
    part = bits[::step][:20]
    Kernels("dense").decode_bf16(part, out[:, 1])
    assert np.array_equal(out[:, 1].view("u4"), part.astype("u4") << 16)
    assert not out[:, 0].any()


def test_a_number_is_passed_as_what_it_is() -> None:
    """Integers of numpy, truth values, and an address beyond what 32 bits hold."""
    tile = np.zeros((1, 64), np.float32)
    for key in (1, 2**64 - 1):
        Kernels("synthetic").fill_picks(1 << 15, np.uint64(key), 3, tile)
        state = (key + 6 * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        assert tile[0, 0] == (state ^ (state >> 31)) & ((1 << 15) - 1)
