"""The values of a checkpoint as tensors of torch, without a copy on the disk: each decoded when it is asked for.

A tensor is the bytes that a conversion to BF16 would write, made by the same steps and kernels, so the two are equal bit for
bit. Its bytes are those of its steps one behind the other (the matrices of a stack), and of a step those of its rows, so any
range of them is tiles of some steps.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch

from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import KconvertError
from kconvert.formats.dtypes import tensor_bytes
from kconvert.planning.steps import Copy, Step, Transcode
from kconvert.run.tiles import copied, decoded, inputs_of, row_unit, wholes_of
from kconvert.run.values import naming

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes

PIECE = 4 << 20  # bytes of a tensor that a thread makes at a time
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),  # since torch 2.7
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(slots=True)
class Stored:
    """A tensor, and the steps that make its bytes, in their order."""

    dtype: str
    shape: tuple[int, ...]
    steps: list[Step]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


class Weights(Mapping[str, torch.Tensor]):
    """What `kconvert.open` returns: name -> tensor, under the names that `convert --to bf16` writes.

    A weight that is quantised is BF16 [out, in], the matrices of a stack are [experts, out, in] where that conversion stacks
    them; what is plain has its own dtype. `weights[name]` decodes the tensor anew each time, into memory that is the caller's;
    `weights.rows(name, first, last)` only what lies between two numbers of its first dimension, and `weights.get_slice(name)`
    is what loaders expect of safetensors. All of it from any thread, and in processes that are forked. Beside the tensors some
    megabytes a thread are in use.

    `weights.layers` is the number of layers without MTP, infinite where config.json does not say it.
    Scales and shapes are looked at as they are read. A KconvertError says what is wrong with which tensor,
    in the words of a conversion. Files stay open until `close`, or the end of a `with` block.
    """

    def __init__(
        self, checkpoint: Checkpoint, steps: Iterable[Step], threads: int | None = None, layers: float = math.inf
    ) -> None:
        self.layers = layers
        self._root = checkpoint.root
        self._reader = checkpoint.reader()
        self._tensors: dict[str, Stored] = {}
        if threads is not None and (type(threads) is not int or threads < 1):
            raise KconvertError(
                f"there are no {threads!r} threads; give a number of them, or none for one on each core"
            )
        self._threads = threads or len(os.sched_getaffinity(0))
        self._own = threading.local()
        self._lock = threading.Lock()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._closed = False
        for step in steps:
            for name, dtype, shape in step.outputs:
                self._tensors.setdefault(name, Stored(dtype, shape, [])).steps.append(step)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        return self._made(name, 0, stored.nbytes, stored.shape)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """`weights[name][first:last]`, for 0 <= first <= last <= its length; nothing else of it is kept in memory.

        KconvertError for other numbers, and for a tensor without dimensions.
        """
        stored = self._tensors[name]
        are_numbers = isinstance(first, SupportsIndex) and isinstance(last, SupportsIndex)
        if not stored.shape or not are_numbers or not 0 <= first <= last <= stored.shape[0]:
            raise KconvertError(
                f"{self._root}: tensor {name!r} {list(stored.shape)} has no rows {first} to {last}; they begin at 0, and the "
                "last is not included"
            )
        row = stored.nbytes // max(stored.shape[0], 1)
        return self._made(name, first * row, last * row, (last - first, *stored.shape[1:]))

    def get_slice(self, name: str) -> Slice:
        """The tensor without reading it, as safetensors has it: its shape and dtype, and what is taken of it with `[]`."""
        stored = self._tensors[name]
        return Slice(self, name, stored.dtype, stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def close(self) -> None:
        """Close the files; calls that are under way end first."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None and pool[0] == os.getpid():
            pool[1].shutdown()
        self._reader.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _made(self, name: str, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of these bytes of the one called `name`."""
        stored = self._tensors[name]
        if stored.dtype not in DTYPES:
            raise KconvertError(f"{self._root}: tensor {name!r} is {stored.dtype}, which torch has no dtype for")
        if self._closed:
            raise KconvertError(f"{self._root} was closed; open it again to read tensor {name!r}")
        whole = torch.empty(stop - start, dtype=torch.uint8)
        room = whole.numpy()
        pieces = list(_pieces(stored, start, stop))

        def fill(piece: Piece) -> None:
            self._fill(piece, room[piece.at : piece.at + piece.last - piece.first])

        if len(pieces) == 1 or self._threads == 1:
            for piece in pieces:
                fill(piece)
        else:
            for _ in self._workers().map(fill, pieces):
                pass
        return whole.view(DTYPES[stored.dtype]).view(shape)

    def _workers(self) -> ThreadPoolExecutor:
        """Threads of this process: those of one that it was forked from are not there."""
        with self._lock:
            if self._pool is None or self._pool[0] != os.getpid():
                self._pool = os.getpid(), ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
            return self._pool[1]

    def _buffers(self) -> Buffers:
        """This thread's."""
        if not hasattr(self._own, "buffers"):
            self._own.buffers = Buffers()
        buffers: Buffers = self._own.buffers
        return buffers

    def _fill(self, piece: Piece, room: Bytes) -> None:
        step, buffers = piece.step, self._buffers()
        if isinstance(step, Copy):
            room[:] = copied(step, piece.first, piece.last, self._reader, buffers)
            return
        row, unit = _row_bytes(step), row_unit(step)
        first = piece.first // row // unit * unit
        last = min(-(-piece.last // row // unit) * unit, step.rows)
        wholes = wholes_of(step, self._reader)
        inputs = inputs_of(step, first, last, wholes, self._reader, buffers)
        for begin, end, tile in decoded(step, inputs, first, last, buffers):
            low, high = max(begin * row, piece.first), min(end * row, piece.last)
            exact = (low, high) == (begin * row, end * row)
            target = room[low - piece.first : high - piece.first] if exact else buffers.take("out", (end - begin) * row)
            with naming(f"{step.title} cannot be written as {step.target.label}", begin, end):
                step.target.encode(tile, [target])
            if not exact:
                room[low - piece.first : high - piece.first] = target[low - begin * row : high - begin * row]


@dataclass(frozen=True, slots=True)
class Slice:
    """A tensor of `weights` that is not read yet, with safetensors' names for what is known of it."""

    weights: Weights
    name: str
    dtype: str
    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors spells it, `BF16`."""
        return self.dtype

    def __getitem__(self, key: Any) -> torch.Tensor:
        """What indexing the tensor gives; of a slice or a number in the first dimension only these rows are decoded."""
        head, *rest = key if isinstance(key, tuple) and key else (key,)
        if self.shape and type(head) is int:  # a bool is an int, too, but a new dimension
            number = range(self.shape[0])[head]
            one = (0, *rest)
            return self.weights.rows(self.name, number, number + 1)[one]
        if self.shape and isinstance(head, slice) and head.step in (None, 1):
            first, last, _ = head.indices(self.shape[0])
            some = (slice(None), *rest)
            return self.weights.rows(self.name, first, max(first, last))[some]
        return self.weights[self.name][key]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `first` to `last` (exclusive) of what a step writes, which are those from `at` on of what was asked for."""

    step: Step
    first: int
    last: int
    at: int


def _pieces(stored: Stored, start: int, stop: int) -> Iterator[Piece]:
    """Bytes `start` to `stop` of the tensor, in pieces of about PIECE, which cut what is decoded together only at its ends."""
    size = stored.nbytes // len(stored.steps)
    unit, begin = PIECE, 0
    if isinstance(step := stored.steps[0], Transcode) and size:
        unit = _row_bytes(step) * row_unit(step)
        unit = max(unit, PIECE // unit * unit)
    for begin, step in zip(range(0, max(stored.nbytes, 1), max(size, 1)), stored.steps, strict=False):
        low, high = max(start - begin, 0), min(stop - begin, size)
        while low < high:
            end = min((low // unit + 1) * unit, high)
            yield Piece(step, low, end, begin + low - start)
            low = end


def _row_bytes(step: Transcode) -> int:
    """Of the one tensor that it writes."""
    (part,) = step.target_parts
    return part.nbytes // step.rows
