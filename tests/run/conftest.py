"""A conversion that something goes wrong with, and what a user may expect of it afterwards."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kconvert import Recipe, plan
from kconvert.cli import main

Tree = Callable[[Path], "dict[str, bytes]"]
Inject = Callable[..., "Tap"]

SHARD_SIZE = 100_000  # makes some fifty shards
LAST = {"config.json", "model.safetensors.index.json"}

# The command, held up a little at every write, so that a signal finds it in the middle on any disk.
SLOW = """
import os, time
def slow(function):
    def held_up(*arguments):
        time.sleep(0.004)
        return function(*arguments)
    return held_up
os.pwrite, os.rename = slow(os.pwrite), slow(os.rename)
from kconvert.cli import main
main()
"""


def run_command(*arguments: object) -> Result:
    """The command in this process, so that faults can be injected; what it does not catch ends the test."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@dataclass
class Job:
    """`kconvert int4-to-bf16 source destination`; `whole` is what an undisturbed run leaves in the destination."""

    source: Path
    destination: Path
    whole: dict[str, bytes]
    tree: Tree
    home: Path  # all paths of the test begin with it; its name is the test's and proves nothing in a message

    @property
    def arguments(self) -> list[str]:
        return ["int4-to-bf16", str(self.source), str(self.destination), "--shard-size", str(SHARD_SIZE)]

    @property
    def files(self) -> dict[str, bytes]:
        return self.tree(self.destination) if self.destination.exists() else {}

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    def shards_of(self, file: str) -> list[str]:
        """The shards that a file of the source goes into."""
        steps = plan(self.source, Recipe("bf16", shard_size=SHARD_SIZE)).steps
        return [
            place.file for step in steps if file in {origin.file for origin in step.origins} for place in step.writes
        ]

    @property
    def state(self) -> set[str]:
        """What lies in the journal's directory."""
        return set(os.listdir(self.destination / ".kconvert"))

    @property
    def records(self) -> int:
        """How many shards the journal knows as finished."""
        journal = self.destination / ".kconvert" / "journal.jsonl"
        return journal.read_text().count('"shard"') if journal.exists() else 0

    def run(self, *options: object) -> Result:
        return run_command(*self.arguments, *options)

    def start(self) -> subprocess.Popen[str]:
        """The same as a process of its own, slowed down."""
        return subprocess.Popen(
            [sys.executable, "-c", SLOW, *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check_error(self, result: Result, *words: str) -> None:
        """Exit code 2 and one sentence on stderr that says `words`."""
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        message = result.stderr.replace(str(self.home), "")
        for word in words:
            assert word.replace(str(self.home), "") in message

    def check_no_half_files(self) -> None:
        """Every visible file is whole; config.json and the index are there only after all else."""
        files = self.files
        for name, content in files.items():
            assert content == self.whole[name], f"{name} is not what an undisturbed run writes"
        if missing := self.whole.keys() - files.keys() - LAST:
            assert not files.keys() & LAST, f"{sorted(missing)[0]} is missing, but the directory looks finished"

    def check_finished(self) -> None:
        files = self.files
        assert sorted(files) == sorted(self.whole)
        assert [name for name in files if files[name] != self.whole[name]] == []
        assert self.state == {"journal.jsonl", "lock"}

    def check_rerun_finishes(self, *options: object) -> None:
        result = self.run(*options)
        assert result.exit_code == 0, result.output
        self.check_finished()


@pytest.fixture(scope="session")
def whole(int4: Path, tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    root = tmp_path_factory.mktemp("undisturbed") / "bf16"
    job = Job(int4, root, {}, tree, root.parent)
    result = job.run()
    assert result.exit_code == 0, result.output
    assert len(job.shards) > 30
    return tree(root)


@pytest.fixture
def job(int4: Path, tmp_path: Path, whole: dict[str, bytes], tree: Tree) -> Job:
    """A conversion of `int4`, whose source must not be touched."""
    return Job(int4, tmp_path / "bf16", whole, tree, tmp_path)


@pytest.fixture
def fragile(int4_copy: Path, job: Job) -> Job:
    """A conversion whose source may be damaged."""
    job.source = int4_copy
    return job


@pytest.fixture
def command() -> Callable[..., Result]:
    return run_command


class Tap:
    """Listens to the calls of an os function on files below a directory; `act(n)` runs before the n-th goes through."""

    def __init__(self, name: str, root: Path, act: Callable[[int], None]) -> None:
        self.calls = 0
        self._act = act
        self._root = os.path.realpath(root)
        self._real = getattr(os, name)
        self._lock = threading.Lock()

    def __call__(self, target: object, *arguments: object, **options: object) -> object:
        link = f"/proc/self/fd/{target}" if isinstance(target, int) else None
        path = os.readlink(link) if link else os.path.abspath(os.fspath(target))  # type: ignore[call-overload]
        if path == self._root or path.startswith(self._root + os.sep):
            with self._lock:
                self.calls += 1
                number = self.calls
            self._act(number)
        return self._real(target, *arguments, **options)


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path, Callable[[int], None]], AbstractContextManager[Tap]]:
    """`with tap("pwrite", root, act)`: run `act(n)` before the n-th os.pwrite to a file below `root`."""

    @contextmanager
    def use(name: str, root: Path, act: Callable[[int], None] = lambda number: None) -> Iterator[Tap]:
        with monkeypatch.context() as patch:
            listener = Tap(name, root, act)
            keeper = getattr(
                pathlib, "_NormalAccessor", None
            )  # Python 3.10's pathlib keeps the functions that it found
            if getattr(keeper, name, None) is getattr(os, name):
                patch.setattr(keeper, name, listener)
            patch.setattr(os, name, listener)
            yield listener

    return use


@pytest.fixture
def broken(
    tap: Callable[..., AbstractContextManager[Tap]], job: Job, tmp_path: Path
) -> Callable[..., AbstractContextManager[Tap]]:
    """`with broken("pwrite", errno.ENOSPC, root, 0.5)`: every call fails from the middle one on, counted on a trial run."""

    def use(name: str, number: int, root: Path, moment: float) -> AbstractContextManager[Tap]:
        trial = replace(job, destination=tmp_path / "trial")
        with tap(name, trial.destination if root == job.destination else root) as listener:
            assert trial.run().exit_code == 0
        shutil.rmtree(trial.destination)
        assert listener.calls > 0, f"os.{name} is never called there"
        first = 1 + int(moment * (listener.calls - 1))

        def fail(call: int) -> None:
            if call >= first:
                raise OSError(number, os.strerror(number))

        return tap(name, root, fail)

    return use


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`refused = refuse_direct("pwrite", delay)`: os.pwrite refuses descriptors opened with O_DIRECT; `refused` grows."""
    import time

    def use(name: str, delay: float = 0.0) -> list[str]:
        real = getattr(os, name)
        refused: list[str] = []

        def fake(target: object, *arguments: object, **options: object) -> object:
            direct = is_direct(target) if isinstance(target, int) else int(arguments[0]) & os.O_DIRECT  # type: ignore[call-overload]
            if direct:
                time.sleep(delay)
                refused.append(name)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(target, *arguments, **options)

        monkeypatch.setattr(os, name, fake)
        return refused

    return use


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mounted("tmpfs", nbytes, options)` or `mounted("ext4", nbytes)`: a file system of its own; skips where impossible."""
    points: list[Path] = []

    def attempt(*command: object) -> None:
        try:
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"cannot make a file system here: {error}")
        if done.returncode:
            pytest.skip(f"cannot make a file system here: {done.stderr.strip()}")

    def mount(kind: str, nbytes: int, options: str = "rw") -> Path:
        point = tmp_path / f"disk{len(points)}"
        point.mkdir()
        if kind == "tmpfs":
            attempt("mount", "-t", "tmpfs", "-o", f"size={nbytes},{options}", "tmpfs", point)
        else:
            image = tmp_path / f"image{len(points)}"
            with open(image, "wb") as file:
                file.truncate(nbytes)
            attempt("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", image)
            attempt("mount", "-o", f"loop,{options}", image, point)
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", str(point)], check=False)
