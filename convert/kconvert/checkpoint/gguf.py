"""The header of a GGUF file: its metadata, and where its tensors lie. Whoever made the file is a stranger.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 2 or 3, little-endian. The four letters GGUF, u32
version, u64 number of tensors, u64 number of keys; for each key its name (a u64 length, then UTF-8), a u32 type and the value;
for each tensor its name, a u32 number of dimensions, these (u64) from the fastest to the slowest, a u32 type and a u64 offset,
which counts from the end of the header and is a multiple of `general.alignment`, as is that end.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from kconvert.checkpoint.safetensors import LENGTH, LFS_POINTER, Tensor
from kconvert.errors import KconvertError
from kconvert.formats import dtypes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 27  # a vocabulary of 256,000 words with its merges takes 16 MB
MOST_ENTRIES = 1 << 17  # tensors, or keys; a large model has 3,000, as the experts of a layer lie in one
MAX_ITEMS = 1 << 22  # of arrays of strings, whose length nothing else tells
MAX_NESTING = 4
LONGEST_TEXT = 1 << 24  # bytes of a value; a chat template has some 10,000
LONGEST_NAME = 1 << 10  # bytes; engines take 63 for tensors
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # unless general.alignment says another
WINDOW = 1 << 20  # bytes of the header read at a time

# The types of values by number: 8 is a string, 9 an array.
SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"},
}
STRING, ARRAY = 8, 9


class Type(NamedTuple):
    """A type of tensors: `nbytes` spell `elements` neighbours of a row."""

    name: str
    elements: int
    nbytes: int


# By number, as `ggml_type` in https://github.com/ggml-org/ggml/blob/master/include/ggml.h counts them; those that are plain are
# called as safetensors files call them.
NUMBERS = {
    **{0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"},
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 41: "Q1_0", 39: "MXFP4", 40: "NVFP4"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 34: "TQ1_0", 35: "TQ2_0"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"},
    **{23: "IQ4_XS", 29: "IQ1_M"},
}
TYPES = {
    number: Type(name, *(dtypes.BLOCKS.get(name) or (1, dtypes.DTYPE_BITS[name] // 8)))
    for number, name in NUMBERS.items()
}
BLOCKS = {type.name: type for type in TYPES.values()}


class Array(NamedTuple):
    """A value that is a list of so many items of a type, which are left in the file, see `read_array`."""

    items: int
    start: int
    kind: int


Value: TypeAlias = "int | float | bool | str | Array"


@dataclass(frozen=True)
class Header:
    """Tensors in the order of their data; of a type that is not known the dtype is `TYPE_n` and the size up to the next.
    `kinds` are the types of the values, by number."""

    metadata: Mapping[str, Value]
    kinds: Mapping[str, int]
    tensors: tuple[Tensor, ...]


def read_gguf(file: str, size: int, read: Callable[[int, int], bytes], inside: str) -> Header:
    """Parse the header of `file`, `size` bytes long, whose bytes `read(start, nbytes)` delivers.

    `inside` is what its tensors call the file. KconvertError, naming the file and the tensor, for everything that is not a
    whole and sound GGUF file.
    """
    cursor = _Cursor(file, size, read)
    _check_kind(cursor)
    count, keys = cursor.number("Q"), cursor.number("Q")
    for what, number in (("tensors", count), ("keys", keys)):
        if number > MOST_ENTRIES:
            raise cursor.fault(f"its header claims {number} {what}, over the limit of {MOST_ENTRIES}")
    metadata: dict[str, Value] = {}
    kinds: dict[str, int] = {}
    for _ in range(keys):
        key = cursor.text(f"key {len(metadata)}", LONGEST_NAME)
        if key in metadata:
            raise cursor.fault(f"it has the key {key!r} twice")
        kinds[key] = cursor.number("I")
        metadata[key] = cursor.value(key, kinds[key])
    entries = [_entry(cursor, number) for number in range(count)]
    alignment = _alignment(cursor, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    return Header(metadata, kinds, _placed(cursor, entries, data_start, alignment, inside))


def read_array(file: str, size: int, read: Callable[[int, int], bytes], array: Array) -> list[Any] | None:
    """The items of a list in the header of `file`, see `read_gguf`; None if they are lists themselves."""
    cursor = _Cursor(file, size, read)
    cursor.skip(array.start)
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind in SCALARS:
        code = f"<{count}{SCALARS[kind]}"
        return list(struct.unpack(code, cursor.take(struct.calcsize(code))))
    return [cursor.text("an item", LONGEST_TEXT) for _ in range(count)] if kind == STRING else None


class _Cursor:
    """Reads the header from its beginning to its end."""

    def __init__(self, file: str, size: int, read: Callable[[int, int], bytes]) -> None:
        self.file, self.size, self.position = file, size, 0
        self._read = read
        self._window, self._start = b"", 0

    def fault(self, what: str, help: str = "the file is damaged, fetch it again") -> KconvertError:
        return KconvertError(f"{self.file}: {what}; {help}")

    def take(self, nbytes: int) -> bytes:
        """The next bytes of the header."""
        first = self.position
        self.skip(nbytes)
        offset = first - self._start
        if offset < 0 or offset + nbytes > len(self._window):
            self._start, offset = first, 0
            self._window = self._read(first, min(max(nbytes, WINDOW), self.size - first))
        return self._window[offset : offset + nbytes]

    def skip(self, nbytes: int) -> None:
        self.position += nbytes
        if self.position > self.size:
            raise self.fault(f"it ends at byte {self.size}, inside its header", "it is truncated, fetch it again")
        if self.position > MAX_HEADER_BYTES:
            raise self.fault(f"its header is longer than the limit of {MAX_HEADER_BYTES} bytes")

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, what: str, longest: int) -> str:
        """A string; `what` it is, for messages."""
        length = self.number("Q")
        if length > longest:
            raise self.fault(f"{what} claims {length} bytes of text, over the limit of {longest}")
        try:
            found = self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} has a text that is not UTF-8") from None
        if longest == LONGEST_NAME and not (found and found.isprintable()):
            raise self.fault(f"{what} has no name that can be printed")
        return found

    def value(self, key: str, kind: int) -> Value:
        if kind in SCALARS:
            found: Value = self.number(SCALARS[kind])
            return found
        if kind == STRING:
            return self.text(f"the key {key!r}", LONGEST_TEXT)
        if kind == ARRAY:
            start, items = self.position, self.number("I")
            self.position = start
            return Array(self._skip_array(key, 1), start, items)
        raise self.fault(f"the key {key!r} has a value of the unknown type {kind}")

    def _skip_array(self, key: str, depth: int) -> int:
        """Go behind an array, whose number of items it returns."""
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[kind]}"))
            return int(count)
        if kind not in (STRING, ARRAY) or depth > MAX_NESTING:
            raise self.fault(f"the key {key!r} is a list of the unknown type {kind}, or too many lists in each other")
        if count > MAX_ITEMS:
            raise self.fault(f"the key {key!r} claims a list of {count} items, over the limit of {MAX_ITEMS}")
        for _ in range(count):
            if kind == STRING:
                self.skip(self.number("Q"))
            else:
                self._skip_array(key, depth + 1)
        return int(count)


def _check_kind(cursor: _Cursor) -> None:
    """KconvertError unless it is a GGUF file that is read here."""
    if cursor.size < LENGTH.size:
        raise cursor.fault(f"{cursor.size} bytes are too few for a GGUF file", "fetch it again")
    magic = cursor.take(4)
    version = cursor.number("I")
    if LENGTH.unpack(magic + struct.pack("<I", version))[0] == LFS_POINTER:
        raise KconvertError(
            f"{cursor.file} is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`"
        )
    if magic != MAGIC:
        raise cursor.fault("it does not begin with GGUF", "this is no GGUF file")
    if version & 0xFFFF == 0:
        raise cursor.fault("it is of big-endian form, which is not read", "give the one for this machine")
    if version not in VERSIONS:
        raise cursor.fault(f"it is of version {version}, but 2 and 3 are read", "give one of these")


class _Entry(NamedTuple):
    """What a header says of a tensor; `offset` counts from the end of the header."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


def _entry(cursor: _Cursor, number: int) -> _Entry:
    name = cursor.text(f"tensor {number}", LONGEST_NAME)
    count = cursor.number("I")
    if count > MOST_DIMENSIONS:
        raise cursor.fault(f"tensor {name!r} claims {count} dimensions, over the limit of {MOST_DIMENSIONS}")
    sizes = [cursor.number("Q") for _ in range(count)]
    if math.prod(sizes) >= 1 << 63:
        raise cursor.fault(f"tensor {name!r} has the shape {sizes[::-1]}, which is larger than any file")
    return _Entry(name, cursor.number("I"), tuple(reversed(sizes)), cursor.number("Q"))


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fault("its general.alignment is no power of two")
    return alignment


def _placed(cursor: _Cursor, entries: list[_Entry], data_start: int, alignment: int, inside: str) -> tuple[Tensor, ...]:
    """The tensors in the order of their data, none of which overlap or leave the file."""
    entries = sorted(entries, key=lambda entry: entry.offset)
    following = [*(data_start + entry.offset for entry in entries), cursor.size][1:]
    tensors: list[Tensor] = []
    names: set[str] = set()
    end = data_start
    for entry, behind in zip(entries, following, strict=True):
        what = f"tensor {entry.name!r}"
        if entry.name in names:
            raise cursor.fault(f"it has the {what} twice")
        names.add(entry.name)
        start = data_start + entry.offset
        if start % alignment:
            raise cursor.fault(f"{what} begins at byte {start}, which is no multiple of its alignment {alignment}")
        if start < end or start - end >= alignment:
            raise cursor.fault(f"{what} {'overlaps the tensor' if start < end else 'leaves a gap'} before it")
        dtype, nbytes = _sized(cursor, entry, max(behind - start, 0))
        end = start + nbytes
        if end > cursor.size:
            raise cursor.fault(
                f"{what} ends at byte {end}, the file has {cursor.size}", "it is truncated, fetch it again"
            )
        tensors.append(Tensor(entry.name, dtype, entry.shape, inside, start, nbytes))
    if (foreign := cursor.size - -(-end // alignment) * alignment) > 0:
        raise cursor.fault(f"bytes behind its tensors, {foreign:,} of them, belong to none")
    return tuple(tensors)


def _sized(cursor: _Cursor, entry: _Entry, most: int) -> tuple[str, int]:
    """Its dtype, and its bytes; `most` of a type whose size is not known."""
    type = TYPES.get(entry.kind)
    if type is None:
        return f"TYPE_{entry.kind}", most
    if entry.shape and entry.shape[-1] % type.elements:
        raise cursor.fault(
            f"tensor {entry.name!r} is {type.name} with rows of {entry.shape[-1]}, no whole blocks of {type.elements}"
        )
    if not entry.shape and type.elements > 1:
        raise cursor.fault(f"tensor {entry.name!r} is {type.name} without dimensions")
    return type.name, math.prod(entry.shape) // type.elements * type.nbytes
