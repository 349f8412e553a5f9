"""What numba makes of loops: C functions, which take arrays as addresses, lengths and strides."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba import carray, cfunc, njit, types
from numpy.lib.stride_tricks import as_strided

from kconvert.native.base import KIND, NONE, SYMBOL, Loop, machine, write

LETTERS = {"u": "uint", "i": "int", "f": "float"}


class Argument(NamedTuple):
    """Of a loop: its type; the names and types of what is passed for it; and how it is made of these."""

    type: Any
    names: list[str]
    types: list[Any]
    made: str


def keep(loop: Loop, path: str) -> None:
    """Compile this loop to that file."""
    made = compiled(loop)
    module = llvm.parse_assembly(made.inspect_llvm().replace(made.native_name, SYMBOL))
    for function in module.functions:
        if not function.is_declaration and function.name != SYMBOL:
            function.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()  # what numba gives to every function, and needs numba itself
    passes.run(module, llvm.create_pass_builder(machine(), llvm.create_pipeline_tuning_options()))
    write(Path(path), machine().emit_object(module))


def compiled(loop: Loop) -> Any:
    """numba's C function that makes the loop's arguments of what is passed, and calls it."""
    function = getattr(import_module(loop.module), loop.name)
    function = getattr(function, "py_func", function)
    arguments = [_argument(f"x{place}", kind) for place, kind in enumerate(loop.kinds)]
    names, passed = ([each for argument in arguments for each in argument[k]] for k in (1, 2))
    result = "0" if function.__annotations__.get("return") == "None" else "found"
    source = f"def entry({', '.join(names)}):\n"
    source += f"    found = loop({', '.join(argument.made for argument in arguments)})\n    return {result}"
    inner = njit(tuple(argument.type for argument in arguments), error_model="numpy", forceinline=True)(function)
    scope: dict[str, Any] = {"loop": inner, "carray": carray, "as_strided": as_strided, "types": types}
    exec(source, scope)  # numba knows no other way to make a function of so many arguments
    return cfunc(types.int64(*passed), error_model="numpy", forceinline=True)(scope["entry"])


def _argument(name: str, kind: str) -> Argument:
    if kind == NONE:
        return Argument(types.none, [], [], "None")
    found = KIND.fullmatch(kind)
    assert found is not None, kind
    letter, size, address, dimensions, placed = found.groups()
    one = types.boolean if letter == "b" else getattr(types, f"{LETTERS[letter]}{8 * int(size)}")
    if address:
        return Argument(types.CPointer(one), [name], [types.CPointer(one)], name)
    if dimensions is None:
        passed, made = (one, name) if letter == "f" else (types.int64, f"types.{one}({name})")
        return Argument(one, [name], [passed], made)
    lengths, strides = ([f"{name}_{what}{k}" for k in range(int(dimensions))] for what in ("length", "stride"))
    shape, start = f"({', '.join(lengths)},)", [types.CPointer(one)]
    if not placed:
        kept = types.Array(one, len(lengths), "C")
        return Argument(kept, [name, *lengths], start + [types.int64] * len(lengths), f"carray({name}, {shape})")
    kept = types.Array(one, len(lengths), "A", aligned=placed != "unaligned")
    made = f"as_strided(carray({name}, (1,)), {shape}, ({', '.join(strides)},))"
    return Argument(kept, [name, *lengths, *strides], start + [types.int64] * 2 * len(lengths), made)
