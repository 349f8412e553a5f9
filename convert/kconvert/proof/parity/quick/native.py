"""Loops over a weight's elements for which torch has no operator, as machine code.

They are Python in `loops`, which numba compiles when a machine first needs them. What it made is kept as an object file, which
llvmlite loads in milliseconds: the processes of a comparison have no use for numba itself, a second to load and 40 MB each.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kconvert.formats import conventions
from kconvert.interpreter import python

if TYPE_CHECKING:
    import torch

LOOPS = Path(__file__).with_name("loops")
SYMBOL = "loop"
DIGEST = hashlib.sha256().digest_size


class Loop:
    """A function of `loops`, by the name of its module and its own. Its arguments are of the numpy types named in `signature`,
    pointers with a star; it returns an i8.

    Called with contiguous tensors for pointers, it says nothing of whether they are long enough.
    """

    def __init__(self, module: str, name: str, signature: str) -> None:
        self.module, self.name = module, name
        self.types = signature.split()

    def __call__(self, *arguments: torch.Tensor | float) -> int:
        found: int = self._code(*(_passed(*each) for each in zip(arguments, self.types, strict=True)))
        return found

    @cached_property
    def _code(self) -> Callable[..., Any]:
        import ctypes

        passed: dict[str, Any] = {"i8": ctypes.c_int64, "f4": ctypes.c_float}
        types = [passed.get(kind, ctypes.c_void_p) for kind in self.types]
        return ctypes.CFUNCTYPE(ctypes.c_int64, *types)(_address(self))


def _passed(argument: torch.Tensor | float, kind: str) -> float | None:
    if not kind.endswith("*"):
        return argument  # type: ignore[return-value]
    assert not isinstance(argument, int | float)
    assert argument.is_contiguous()
    assert argument.element_size() == int(kind[1])
    return argument.data_ptr()


_loaded: list[Any] = []  # what keeps the machine code in memory


def _address(loop: Loop) -> int:
    """Of its machine code in this process, by numba itself where what is kept cannot be had, or does not load."""
    code = _kept(loop)
    with suppress(RuntimeError):
        if code is not None:
            return _load(loop, code)
    compiled = _compiled(loop)
    _loaded.append(compiled)
    address: int = compiled.address
    return address


def _load(loop: Loop, code: bytes) -> int:
    """RuntimeError where it needs what only numba has."""
    import llvmlite.binding as llvm

    compiler = llvm.create_lljit_compiler(_machine())
    library = llvm.JITLibraryBuilder().add_object_img(code).export_symbol(SYMBOL)
    tracker = library.link(compiler, f"{loop.module}.{loop.name}")
    address: int = tracker[SYMBOL]
    _loaded.append((compiler, tracker))
    return address


def _kept(loop: Loop) -> bytes | None:
    """The object file, kept before or now, by one process at a time; None where that cannot be."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / f"{loop.module}.{loop.name}-{_key(*loop.types)}.o"
    try:
        if (code := _sound(path)) is None:
            with _locked(path.with_suffix(".lock")):
                if (code := _sound(path)) is None:
                    _let_keep(loop, path)
                    code = _sound(path)
    except OSError:
        return None
    return code


def _sound(path: Path) -> bytes | None:
    """The content behind its digest; None where there is none, or it was cut off or damaged."""
    with suppress(FileNotFoundError):
        data = path.read_bytes()
        digest, code = data[:DIGEST], data[DIGEST:]
        if hashlib.sha256(code).digest() == digest:
            return code
    return None


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
    work = python(f"from {__name__} import keep; keep({loop.module!r}, {loop.name!r}, {loop.types!r}, {str(path)!r})")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    subprocess.run(work, capture_output=True, check=False, env=settings)


def keep(module: str, name: str, types: list[str], path: str) -> None:
    """Compile this loop to that file, behind its digest."""
    import llvmlite.binding as llvm

    compiled = _compiled(Loop(module, name, " ".join(types)))
    text = compiled.inspect_llvm().replace(compiled.native_name, SYMBOL)
    code: bytes = _machine().emit_object(llvm.parse_assembly(text))
    part = Path(f"{path}.part")
    part.write_bytes(hashlib.sha256(code).digest() + code)
    part.replace(path)


def prepare() -> None:
    """Load what loads loops, which forks then have in common."""
    import llvmlite.binding as llvm

    llvm.create_lljit_compiler(_machine())


@cache
def _folder() -> Path | None:
    """Where Python keeps what it made of these files, else in the user's own folder; None where neither can be written to."""
    for place in (LOOPS / "__pycache__", Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kconvert")):
        with suppress(OSError, RuntimeError):  # the latter for a user without a home
            folder = place.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


@cache
def _key(*types: str) -> str:
    """Changes with the types of the arguments, the loops, what compiles them, and the processor."""
    from importlib.metadata import version

    import llvmlite.binding as llvm

    about = [version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    sources = [
        path.read_text("utf-8")
        for path in (*sorted(LOOPS.glob("*.py")), Path(__file__), Path(str(conventions.__file__)))
    ]
    return hashlib.sha256("\0".join([*types, *about, *sources]).encode()).hexdigest()[:16]


@cache
def _machine() -> Any:
    """The processor at hand, as llvmlite sees it."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, reloc="pic", codemodel="jitdefault"
    )


def _compiled(loop: Loop) -> Any:
    """numba's function of the loop."""
    from importlib import import_module

    from numba import cfunc, types

    names = {"u1": "uint8", "u2": "uint16", "u4": "uint32", "i8": "int64", "f4": "float32", "f8": "float64"}
    own = [getattr(types, names[kind.rstrip("*")]) for kind in loop.types]
    own = [types.CPointer(one) if kind.endswith("*") else one for one, kind in zip(own, loop.types, strict=True)]
    function = getattr(import_module(f"kconvert.proof.parity.quick.loops.{loop.module}"), loop.name)
    return cfunc(types.int64(*own), error_model="numpy", forceinline=True)(function)
