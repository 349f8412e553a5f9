"""Numba kernels, a module a family: tight loops over caller-owned buffers, without the GIL, compiled once and kept.

Each equals its twin in `kconvert.formats.reference` bit for bit. Arrays are two-dimensional with one quantisation group a
row, because LLVM vectorises loops of that shape; inner loops count from the start of a slice, because an index that could be
negative is looked at for every element. bf16 travels as the upper half of an f32, in u16. What a kernel needs room for it is
given: see native.Loop for what it must not do. The formats call them by `Kernels`, and only who compiles imports their modules.
"""

from __future__ import annotations

from collections.abc import Callable
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
        kernel = Kernel(self._module, name)
        setattr(self, name, kernel)
        return kernel


class Kernel:
    """Called with arrays, numbers and None, it is loaded for each kind of these, as is compiled for each."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._loaded: dict[tuple[str, ...], Callable[..., int]] = {}

    def __call__(self, *arguments: Any) -> int:
        numbers: list[float] = []
        kinds = tuple([_pass(argument, numbers) for argument in arguments])
        function = self._loaded.get(kinds)
        if function is None:
            function = self._loaded[kinds] = PACKAGE.load(self._module, self._name, kinds)
        return function(*numbers)


def _pass(argument: Any, numbers: list[float]) -> str:
    """Put what is passed for an argument behind `numbers`; its kind, see native.Loop."""
    if (number := NUMBERS.get(type(argument))) is not None:
        if number != NONE:
            numbers.append(argument)
        return number
    about = argument.__array_interface__
    kind: str = about["typestr"][1:]
    shape, strides, address = about["shape"], about["strides"], about["data"][0]
    if not shape:
        numbers.append(argument.item())
        return kind
    numbers += (address, *shape)
    size = int(kind[1])
    if strides is None and not address % size:
        return f"{kind}[{len(shape)}]"
    numbers += strides or argument.strides
    return f"{kind}[{len(shape)}{'strided' if argument.flags.aligned else 'unaligned'}]"
