"""Loops over elements as machine code: numba makes it once on a machine, llvmlite loads it in milliseconds ever after.

Who only runs a loop has no use for numba, which takes half a second to load and 70 MB. What it made is kept as an object file,
behind its digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kconvert.errors import KconvertError
from kconvert.interpreter import python
from kconvert.native.base import NONE, SYMBOL, Loop, features, machine, read

if TYPE_CHECKING:
    from types import ModuleType

# What ends a compiler that cannot go on; other signals come from a person.
CRASHES = {signal.SIGABRT, signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGKILL}


class Package:
    """A package of modules with loops, which import nothing of ours but each other and what is `beside` them."""

    def __init__(self, name: str, *beside: ModuleType) -> None:
        self.name, self._beside = name, beside

    def load(self, module: str, name: str, kinds: tuple[str, ...]) -> Callable[..., int]:
        """A loop of a module as a function of numbers, which runs without the GIL."""
        import ctypes

        loop = Loop(f"{self.name}.{module}", name, kinds)
        passed = [_passed(kind) for kind in kinds if kind != NONE]
        path = self.folder and self.folder / f"{module}.{name}-{self._key(kinds)}.o"
        function: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_int64, *passed)(_address(loop, path))
        return function

    @cached_property
    def folder(self) -> Path | None:
        """Where Python keeps what it made of these files, else in the user's own folder; None where neither can be written
        to."""
        for place in (self._home / "__pycache__", Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kconvert")):
            with suppress(OSError, RuntimeError):  # the latter for a user without a home
                folder = place.expanduser()
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return folder
        return None

    @cached_property
    def _home(self) -> Path:
        from importlib import import_module

        return Path(str(import_module(self.name).__file__)).parent

    def _key(self, kinds: tuple[str, ...]) -> str:
        """Changes with the types of the arguments, the loops, what compiles them, and the processor."""
        return hashlib.sha256("\0".join([*kinds, *self._about]).encode()).hexdigest()[:16]

    @cached_property
    def _about(self) -> list[str]:
        versions = [_installed("numba"), _installed("llvmlite")]
        import llvmlite.binding as llvm

        ours = [Path(str(module.__file__)) for module in self._beside]
        sources = [*sorted(self._home.glob("*.py")), *sorted(Path(__file__).parent.glob("*.py")), *ours]
        compilers = [*versions, llvm.get_host_cpu_name(), features()]
        return [*compilers, *(path.read_text("utf-8") for path in sources)]


def _installed(name: str) -> str:
    """What changes with a package, as Python itself tells: asking for its version takes longer than to load a loop."""
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise KconvertError(
            f"{name} is not installed in {sys.prefix}, which compiles what computes; `pip install {name}`"
        )
    path = spec.origin
    about = os.stat(path)
    return f"{path} {about.st_mtime_ns} {about.st_size}"


def prepare() -> None:
    """Load what loads loops, which forks then have in common."""
    import llvmlite.binding as llvm

    llvm.create_lljit_compiler(machine())


def _passed(kind: str) -> type[Any]:
    """What ctypes takes for an argument."""
    import ctypes

    numbers: dict[str, type[Any]] = {"f4": ctypes.c_float, "f8": ctypes.c_double}
    return numbers.get(kind, ctypes.c_void_p if kind[2:] else ctypes.c_int64)


_loaded: list[Any] = []  # what keeps the machine code in memory


def _address(loop: Loop, path: Path | None) -> int:
    """Of its machine code in this process, by numba itself where what is kept cannot be had, or does not load."""
    code = _kept(loop, path) if path else None
    with suppress(RuntimeError):
        if code is not None:
            return _load(loop, code)
    from kconvert.native.compiling import compiled

    made = compiled(loop)
    _loaded.append(made)
    address: int = made.address
    return address


def _load(loop: Loop, code: bytes) -> int:
    """RuntimeError where it needs what only numba has."""
    import llvmlite.binding as llvm

    compiler = llvm.create_lljit_compiler(machine())
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process().export_symbol(SYMBOL)
    tracker = library.link(compiler, f"{loop.module}.{loop.name}")
    address: int = tracker[SYMBOL]
    _loaded.append((compiler, tracker))
    return address


def _kept(loop: Loop, path: Path) -> bytes | None:
    """The object file, kept before or now, by one process at a time; None where that cannot be."""
    try:
        if (code := read(path)) is None:
            with _locked(path.with_suffix(".lock")):
                if (code := read(path)) is None:
                    _let_keep(loop, path)
                    code = read(path)
    except OSError:
        return None
    return code


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _let_keep(loop: Loop, path: Path) -> None:
    """By a process of its own, as numba's memory stays with whoever has loaded it, and its settings with what it makes."""
    import subprocess

    work = python(f"from kconvert.native.compiling import Loop, keep; keep({loop!r}, {str(path)!r})")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    ended = subprocess.run(work, capture_output=True, check=False, env=settings, text=True, errors="replace")
    if -ended.returncode in CRASHES:  # as it would end this process, too
        about = f"signal {-ended.returncode}: {ended.stderr.strip().rpartition(chr(10))[2] or 'it said nothing'}"
        raise KconvertError(f"numba cannot compile {loop.module}.{loop.name} on this machine ({about})")
