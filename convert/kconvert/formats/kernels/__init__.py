"""Numba kernels, a module a family: tight loops over caller-owned buffers, without the GIL, compiled once and kept.

Each equals its twin in `kconvert.formats.reference` bit for bit. Arrays are two-dimensional with one quantisation group a
row, because LLVM vectorises loops of that shape; inner loops count from the start of a slice, because an index that could be
negative is looked at for every element. bf16 travels as the upper half of an f32, in u16. What a kernel needs room for it is
given: see native.Loop for what it must not do. The formats call them by `Kernels`, and only who compiles imports their modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from kconvert.formats import conventions
from kconvert.native import Package
from kconvert.native.base import NONE

PACKAGE = Package(__name__, conventions)
NUMBERS = {int: "i8", bool: "b1", float: "f8", type(None): NONE}


class Kernels:
    """Those of a module, by their names."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_"):
            raise AttributeError(name)
        kernel = Kernel(self._module, name)
        setattr(self, name, kernel)
        return kernel


class Kernel:
    """Called with arrays, numbers and None, it is loaded for each kind of these, as it was compiled for each."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._loaded: dict[tuple[Any, ...], Callable[..., int]] = {}

    def __call__(self, *arguments: Any) -> int:
        address_of = _address_in_capsule()
        facts, passed, held = [], [], []
        for argument in arguments:
            if (number := NUMBERS.get(type(argument))) is not None:
                facts.append(number)
                if number != NONE:
                    passed.append(argument)
            elif not argument.ndim:  # a number of numpy's
                facts.append(argument.dtype.str[1:])
                passed.append(argument.item())
            else:
                flags, capsule = argument.flags, argument.__array_struct__
                facts += (argument.dtype.char, argument.ndim, flags.c_contiguous)
                passed.append(address_of(capsule, None))
                held.append(capsule)
        function = self._loaded.get(key := tuple(facts))
        if function is None:
            kinds = tuple(_kind(argument) for argument in arguments)
            function = self._loaded[key] = PACKAGE.load(self._module, self._name, kinds)
        return function(*passed)


@cache
def _address_in_capsule() -> Any:
    """Python's function for what C code hands out, as `__array_struct__`."""
    import ctypes

    return ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )


def _kind(argument: Any) -> str:
    """Of an argument, see native.base.Loop."""
    if (number := NUMBERS.get(type(argument))) is not None:
        return number
    kind = argument.dtype.str[1:]
    if not argument.ndim:
        return str(kind)
    return f"{kind}[{argument.ndim}{'' if argument.flags.c_contiguous else 'strided'}]"
