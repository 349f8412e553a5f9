"""What numba makes of loops: C functions, which take arrays as numpy's PyArrayInterface."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from numpy import int64
from numpy.lib.stride_tricks import as_strided

from kconvert.native.base import KIND, NONE, OPTIONS, SYMBOL, Loop, machine, write

LETTERS = {"u": "uint", "i": "int", "f": "float"}
# Among the words of a PyArrayInterface: the first three have smaller numbers.
SHAPE, STRIDES, DATA = 3, 4, 5


class Argument(NamedTuple):
    """Of a loop: its type, that of what is passed for it, and how it is made of this."""

    type: Any
    passed: Any
    made: str


def keep(loop: Loop, path: str) -> None:
    """Compile this loop to that file."""
    made = compiled(loop)
    module = llvm.parse_assembly(made.inspect_llvm().replace(made.native_name, SYMBOL))
    for function in module.functions:
        if not function.is_declaration and function.name != SYMBOL:
            function.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    # Whoever calls a function looks whether it has raised something, which needs numba; but none of these does.
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine(), llvm.create_pipeline_tuning_options()))
    write(Path(path), machine().emit_object(module))


def compiled(loop: Loop) -> Any:
    """numba's C function that makes the loop's arguments of what is passed, and calls it."""
    function = getattr(import_module(loop.module), loop.name)
    function = getattr(function, "py_func", function)
    arguments = [_argument(f"x{place}", kind) for place, kind in enumerate(loop.kinds)]
    passed = {f"x{place}": argument.passed for place, argument in enumerate(arguments) if argument.passed is not None}
    result = "0" if function.__annotations__.get("return") == "None" else "found"
    source = f"def entry({', '.join(passed)}):\n"
    source += f"    found = loop({', '.join(argument.made for argument in arguments)})\n    return {result}"
    inner = njit(tuple(argument.type for argument in arguments), **OPTIONS)(function)
    known = {"anywhere": anywhere, "carray": carray, "as_strided": as_strided, "types": types, "int64": int64}
    scope = {"loop": inner, **known}
    exec(source, scope)  # numba knows no other way to make a function of so many arguments
    return cfunc(types.int64(*passed.values()), error_model="numpy")(scope["entry"])


@intrinsic
def anywhere(_context: Any, array: Any) -> Any:
    """The array, without the promise that its elements are aligned."""
    kept = types.Array(array.dtype, array.ndim, array.layout, aligned=False)
    return kept(array), lambda _target, _builder, _signature, passed: passed[0]


def _argument(name: str, kind: str) -> Argument:
    if kind == NONE:
        return Argument(types.none, None, "None")
    found = KIND.fullmatch(kind)
    assert found is not None, kind
    letter, size, address, dimensions, placed = found.groups()
    one = types.boolean if letter == "b" else getattr(types, f"{LETTERS[letter]}{8 * int(size)}")
    if address:
        return Argument(types.CPointer(one), types.CPointer(one), name)
    if dimensions is None:
        return Argument(one, one if letter == "f" else types.int64, f"types.{one}({name})")
    shape, strides = (
        f"({''.join(f'carray({name}[{word}], {dimensions}, int64)[{k}], ' for k in range(int(dimensions)))})"
        for word in (SHAPE, STRIDES)
    )
    made = f"carray({name}[{DATA}], {shape}, types.{one})"
    if placed:
        made = f"as_strided({made}, {shape}, {strides})"
    kept = types.Array(one, int(dimensions), "A" if placed else "C", aligned=size == "1")
    return Argument(kept, types.CPointer(types.voidptr), made if kept.aligned else f"anywhere({made})")
