"""What is compiled, for which processor, and the file that keeps it."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SYMBOL = "loop"  # in an object file
DIGEST = hashlib.sha256().digest_size
NONE = "none"
# Of all that numba compiles for a loop: nothing is called from Python, or from C but the loop itself.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
KIND = re.compile(r"([uifb])(\d)(?:(\*)|\[(\d)(strided)?\])?")


class Loop(NamedTuple):
    """A function of a module, by their names, for arguments of these kinds. It returns an integer or nothing; it allocates
    nothing and raises nothing, which would need numba.

    `i8` is a number of numpy's type i8, `none` is None, for which nothing is passed. `u1*` is an address. `u1[2]` is an array
    of two dimensions in one piece, `u1[2strided]` one that is not, both at any address, as tensors lie anywhere in a file:
    aligned ones would be no faster, and compiled apart. For arrays the address of what numpy calls their PyArrayInterface is
    passed, which costs less than to ask for what is in it.
    """

    module: str
    name: str
    kinds: tuple[str, ...]


def has(feature: str) -> bool:
    """Whether the processor has it, by LLVM's name."""
    return f"+{feature}" in features().split(",")


def read(path: Path) -> bytes | None:
    """The content behind its digest; None where there is none, or it was cut off or damaged."""
    with suppress(FileNotFoundError):
        data = path.read_bytes()
        digest, code = data[:DIGEST], data[DIGEST:]
        if hashlib.sha256(code).digest() == digest:
            return code
    return None


def write(path: Path, code: bytes) -> None:
    """What `read` gives back."""
    part = Path(f"{path}.part")
    try:
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@cache
def features() -> str:
    import llvmlite.binding as llvm

    features: str = llvm.get_host_cpu_features().flatten()
    return features


@cache
def machine() -> Any:
    """The processor at hand, as llvmlite sees it."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target, name = llvm.Target.from_default_triple(), llvm.get_host_cpu_name()
    return target.create_target_machine(cpu=name, features=features(), opt=3, reloc="pic", codemodel="jitdefault")
