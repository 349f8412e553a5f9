"""Vectors of a known number of values in numba kernels: a loop over the few values of a group costs more than its arithmetic.

They lie in arrays of bf16 (in u16) or f32, [rows, cols], from a place on; LLVM makes of them what the CPU has.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, overload, register_model

F = TypeVar("F", bound=Callable[..., Any])
WORD, HALF, FLOAT = ir.IntType(32), ir.IntType(16), ir.FloatType()
# One instruction rounds to bf16, half to even; but it takes subnormal numbers for zeros.
NARROWS = "+avx512bf16" in cpu_target.target_context.codegen().magic_tuple()[2]


def kernel(function: F) -> F:
    return njit(nogil=True, cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]


class _Bf16(ir.Type):  # type: ignore[misc]  # llvmlite lacks it
    def __str__(self) -> str:
        return "bfloat"


BF16 = _Bf16()


class Vector(types.Type):  # type: ignore[misc]
    """So many f32, or if not `floats`, u32."""

    def __init__(self, lanes: int, floats: bool) -> None:
        self.lanes, self.floats = lanes, floats
        super().__init__(name=f"Vector({lanes}, {floats})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(FLOAT if self.floats else WORD, self.lanes)


@register_model(Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


def _all(builder: Any, number: Any, lanes: int) -> Any:
    """A vector of one number."""
    kind = ir.VectorType(number.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, WORD(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(WORD, lanes), None))


def _words(lanes: int, number: int) -> Any:
    return ir.Constant(ir.VectorType(WORD, lanes), [number] * lanes)


def _place(context: Any, builder: Any, signature: Any, args: Any, kind: Any) -> Any:
    """Where in the array of the first argument the values of this LLVM type begin."""
    struct = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
    pointer = cgutils.get_item_pointer(context, builder, signature.args[0], struct, args[1:3])
    return builder.bitcast(pointer, kind.as_pointer())


def _rounded(builder: Any, floats: Any, lanes: int) -> Any:
    """f32 -> bf16 bits in i16; like bits.round_bits."""
    bits = builder.bitcast(floats, ir.VectorType(WORD, lanes))
    odd = builder.and_(builder.lshr(bits, _words(lanes, 16)), _words(lanes, 1))
    return _upper(builder, builder.add(builder.add(bits, _words(lanes, 0x7FFF)), odd), lanes)


def _rounded_if_normal(builder: Any, floats: Any, lanes: int) -> Any:
    """The same, but subnormal numbers may become zeros."""
    if not NARROWS:
        return _rounded(builder, floats, lanes)
    narrow = builder.fptrunc(builder.bitcast(floats, ir.VectorType(FLOAT, lanes)), ir.VectorType(BF16, lanes))
    return builder.bitcast(narrow, ir.VectorType(HALF, lanes))


def _upper(builder: Any, words: Any, lanes: int) -> Any:
    return builder.trunc(builder.lshr(words, _words(lanes, 16)), ir.VectorType(HALF, lanes))


def _widened(builder: Any, halves: Any, lanes: int) -> Any:
    """bf16 bits in i16 -> f32 bits."""
    return builder.shl(builder.zext(halves, ir.VectorType(WORD, lanes)), _words(lanes, 16))


def _count(lanes: Any) -> int:
    """Of a literal argument; 0 while numba tries it as any integer."""
    return int(lanes.literal_value) if isinstance(lanes, types.IntegerLiteral) else 0


def _loading(narrowed: Callable[[Any, Any, int], Any]) -> Any:
    @intrinsic
    def load(_context: Any, values: Any, row: Any, col: Any, lanes: Any) -> Any:
        if not (count := _count(lanes)):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            is_half = values.dtype == types.uint16
            kind = ir.VectorType(HALF if is_half else FLOAT, count)
            found = builder.load(_place(context, builder, signature, args, kind), align=2 if is_half else 4)
            halves = found if is_half else narrowed(builder, found, count)
            return builder.bitcast(_widened(builder, halves, count), ir.VectorType(FLOAT, count))

        return Vector(count, True)(values, types.intp, types.intp, lanes), codegen

    return load


# So many values from [row, col] on as f32, rounded to bf16; none may be NaN. `load_normal`: subnormal ones may become 0.
load, load_normal = _loading(_rounded), _loading(_rounded_if_normal)


def _storing(narrowed: Callable[[Any, Any, int], Any]) -> Any:
    @intrinsic
    def store(_context: Any, values: Any, row: Any, col: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            halves = narrowed(builder, args[3], vector.lanes)
            is_half = values.dtype == types.uint16
            found = halves if is_half else _widened(builder, halves, vector.lanes)
            place = _place(context, builder, signature, args, found.type)
            builder.store(found, place, align=2 if is_half else 4)
            return context.get_dummy_value()

        return types.void(values, types.intp, types.intp, vector), codegen

    return store


def _cut(builder: Any, floats: Any, lanes: int) -> Any:
    return _upper(builder, builder.bitcast(floats, ir.VectorType(WORD, lanes)), lanes)


# Put f32 into values from [row, col] on: those that are bf16, and those that are rounded, where subnormal ones may become 0
# and none may be NaN.
store_exact, store_normal = _storing(_cut), _storing(_rounded_if_normal)


def _reducing(name: str, less: int) -> Any:
    @intrinsic
    def reduce(_context: Any, values: Any, row: Any, col: Any, lanes: Any) -> Any:
        if not (count := _count(lanes)):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            is_half = values.dtype == types.uint16
            one = HALF if is_half else WORD
            kind = ir.VectorType(one, count)
            stored = builder.load(_place(context, builder, signature, args, kind), align=2 if is_half else 4)
            magnitudes = builder.and_(stored, ir.Constant(kind, [(1 << one.width - 1) - 1] * count))
            given = builder.sub(magnitudes, ir.Constant(kind, [less] * count))
            function = ir.FunctionType(one, [kind])
            symbol = f"llvm.vector.reduce.{name}.v{count}i{one.width}"
            found = builder.call(cgutils.get_or_insert_function(builder.module, function, symbol), [given])
            found = builder.add(found, one(less))
            return builder.shl(builder.zext(found, WORD), WORD(16)) if is_half else found

        return types.uint32(values, types.intp, types.intp, lanes), codegen

    return reduce


# Bits, as of f32, of the largest magnitude of so many values as they are stored; NaN is larger than infinity.
largest = _reducing("umax", 0)
# Of the smallest that is not zero; 0 if there is none.
smallest = _reducing("umin", 1)


@intrinsic
def union(_context: Any, vector: Any) -> Any:
    """All bits that are set in one of the u32."""
    if not isinstance(vector, Vector) or vector.floats:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(WORD, [vector.llvm])
        symbol = f"llvm.vector.reduce.or.v{vector.lanes}i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, symbol), args)

    return types.uint32(vector), codegen


def _casting(floats: bool) -> Any:
    @intrinsic
    def cast(_context: Any, vector: Any) -> Any:
        result = Vector(vector.lanes, floats)
        return result(vector), lambda context, builder, signature, args: builder.bitcast(args[0], result.llvm)

    return cast


bits_of, floats_of = _casting(False), _casting(True)


@intrinsic
def rounded(_context: Any, vector: Any) -> Any:
    """f32 rounded to bf16, but subnormal ones may become 0; none may be NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = _rounded_if_normal(builder, args[0], vector.lanes)
        return builder.bitcast(_widened(builder, halves, vector.lanes), vector.llvm)

    return vector(vector), codegen


def _binary(on_words: str, on_floats: str) -> Any:
    """Of two vectors, or a vector and a number; by the methods of the builder that are named so."""

    @intrinsic
    def operation(_context: Any, one: Any, other: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            right = args[1] if isinstance(other, Vector) else _all(builder, args[1], one.lanes)
            return getattr(builder, on_floats if one.floats else on_words)(args[0], right)

        number = types.float32 if one.floats else types.uint32
        return one(one, other if isinstance(other, Vector) else number), codegen

    return operation


def _choosing(on_words: str, on_floats: str) -> Any:
    """Of two vectors, or a vector and a number, in every lane the one that compares so to the other."""

    @intrinsic
    def operation(_context: Any, one: Any, other: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            right = args[1] if isinstance(other, Vector) else _all(builder, args[1], one.lanes)
            compare = builder.fcmp_ordered if one.floats else builder.icmp_unsigned
            return builder.select(compare(on_floats if one.floats else on_words, args[0], right), args[0], right)

        number = types.float32 if one.floats else types.uint32
        return one(one, other if isinstance(other, Vector) else number), codegen

    return operation


larger, smaller = _choosing(">", ">"), _choosing("<", "<")


def _operator(symbol: Any, operation: Any) -> None:
    @overload(symbol, strict=False)
    def _of_vectors(one: Any, other: Any) -> Any:
        return (lambda one, other: operation(one, other)) if isinstance(one, Vector) else None  # noqa: PLW0108


_operator(operator.add, _binary("add", "fadd"))
_operator(operator.sub, _binary("sub", "fsub"))
_operator(operator.mul, _binary("mul", "fmul"))
_operator(operator.truediv, _binary("", "fdiv"))
_operator(operator.and_, _binary("and_", ""))
_operator(operator.or_, _binary("or_", ""))
_operator(operator.xor, _binary("xor", ""))
