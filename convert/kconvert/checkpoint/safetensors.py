"""The safetensors header: parse, lay out, encode.

Format: https://github.com/huggingface/safetensors#format. A file is an 8-byte little-endian length N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__": {str: str}}`, then the tensors' bytes. Offsets
count from the end of the header and must cover the data without gap or overlap.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from json.encoder import encode_basestring
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from kconvert.checkpoint.files import PAGE
from kconvert.errors import KconvertError
from kconvert.formats.dtypes import DTYPE_BITS, tensor_bytes

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
KEYS = ("dtype", "shape", "data_offsets")
Described: TypeAlias = tuple[str, str, tuple[int, ...]]  # name, dtype and shape of a tensor
Entry: TypeAlias = tuple[str, tuple[int, ...], int, int]  # dtype, shape, start from the end of the header, bytes
LENGTH = struct.Struct("<Q")
(LFS_POINTER,) = LENGTH.unpack(b"version ")  # how the text begins that Git LFS leaves in a file's place


class Tensor(NamedTuple):
    """An entry of one of a checkpoint's files; `start` counts bytes from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.file}: {self.title}"

    @property
    def title(self) -> str:
        """What a message calls it that names the file."""
        return f"tensor {self.name!r}"


def read_header(file: str, size: int, read: Callable[[int, int], bytes], inside: str | None = None) -> list[Tensor]:
    """Parse the header of `file`, `size` bytes long, whose bytes `read(start, nbytes)` delivers.

    `inside` is what its tensors call the file, if that is another name, as within its checkpoint. Raises KconvertError, naming
    the file and the tensor, for everything that is not a whole and sound safetensors file.
    """
    if size < LENGTH.size:
        raise KconvertError(f"{file}: {size} bytes are too few for a safetensors file; fetch it again")
    (length,) = LENGTH.unpack(read(0, LENGTH.size))
    if length == LFS_POINTER:
        raise KconvertError(f"{file} is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`")
    if length > MAX_HEADER_BYTES:
        raise KconvertError(
            f"{file}: its header claims {length} bytes, over the limit of {MAX_HEADER_BYTES}; this is no safetensors file"
        )
    if LENGTH.size + length > size:
        raise KconvertError(
            f"{file}: its header claims {length} bytes but the file has {size}; it is truncated, fetch it again"
        )
    return parse_header(file, size, read(LENGTH.size, length), file if inside is None else inside)


def read_metadata(read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """What the header of a sound file says of the file as a whole."""
    (length,) = LENGTH.unpack(read(0, LENGTH.size))
    metadata = json.loads(read(LENGTH.size, length)).get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def parse_header(file: str, size: int, text: bytes, inside: str) -> list[Tensor]:
    """Parse the JSON of a header, in the order of the data; see read_header."""
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_entry_or_table)
    except (ValueError, RecursionError) as error:
        raise KconvertError(f"{file}: its header is not valid JSON ({error}); fetch it again") from None
    if not isinstance(table, dict):
        raise KconvertError(f"{file}: its header is not a JSON object of tensors; this is no safetensors file")
    table.pop("__metadata__", None)
    data_start = LENGTH.size + len(text)
    tensors = []
    for name, info in table.items():
        sound = type(info) is tuple and name.isprintable()
        dtype, shape, start, nbytes = info if sound else _doubtful_entry(file, name, info)
        tensors.append(Tensor(name, dtype, shape, inside, data_start + start, nbytes))
    tensors.sort(key=itemgetter(4, 5))  # start and nbytes: attributes take longer
    _check_cover(file, size, tensors, data_start)
    return tensors


def _entry_or_table(pairs: list[tuple[str, Any]]) -> Entry | dict[str, Any]:
    """Of some 500,000 entries in a large checkpoint those that are sound take this short way through the checks."""
    try:
        (first, dtype), (second, shape), (third, (start, stop)) = pairs
        if (first, second, third) == KEYS and type(shape) is list and type(start) is type(stop) is int and start >= 0:
            dtype, shape, nbytes = _kind(dtype, *shape)
            if nbytes == stop - start:
                return dtype, shape, start, nbytes
    except (KeyError, TypeError, ValueError):
        pass
    return _unique_keys(pairs)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {name!r} twice")
    return table


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


@lru_cache(maxsize=4096, typed=True)  # typed: True is no size, and equal to 1
def _kind(dtype: str, *shape: int) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and bytes, shared by all tensors that have these; ValueError where that is no sound tensor."""
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError
    nbytes, rest = divmod(_elements(shape) * DTYPE_BITS[dtype], 8)
    if rest:
        raise ValueError
    return dtype, shape, nbytes


def _doubtful_entry(file: str, name: str, info: Any) -> Entry:
    """The same with every check by itself, to say what is wrong."""
    where = f"{file}: tensor {name!r}"
    if not name.isprintable() and not _is_unicode(name):
        raise KconvertError(f"{where} has a name that is not Unicode; the file is damaged, fetch it again")
    if type(info) is tuple:
        return info
    if not isinstance(info, dict) or info.keys() != set(KEYS):
        raise KconvertError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise KconvertError(f"{where} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise KconvertError(f"{where} has the shape {shape!r}, which is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise KconvertError(f"{where} has the data_offsets {offsets!r}, which are not two sizes")
    start, stop = offsets
    if _elements(shape) * DTYPE_BITS[dtype] != 8 * (stop - start):
        raise KconvertError(f"{where} is {dtype} {shape[:8]}, but its data_offsets span {stop - start} bytes")
    return dtype, tuple(shape), start, stop - start


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _elements(shape: Sequence[int]) -> int:
    """The product of the sizes, cut short once it is larger than any file: hostile shapes take no time."""
    count = 1
    for size in shape if 0 not in shape else ():
        count *= size
        if count >= 1 << 64:
            break
    return 0 if 0 in shape else count


def _check_cover(file: str, size: int, tensors: list[Tensor], data_start: int) -> None:
    position = data_start
    for name, _, _, _, start, nbytes in tensors:
        if start != position:
            fault = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise KconvertError(f"{file}: tensor {name!r} {fault}; the file is damaged, fetch it again")
        position += nbytes
    if position != size:
        fault = "is truncated" if position > size else "has bytes that no tensor owns"
        raise KconvertError(
            f"{file} {fault}: its header describes {position} bytes, the file has {size}; fetch it again"
        )


@lru_cache(maxsize=4096)
def _laid_out(dtype: str, shape: tuple[int, ...]) -> tuple[tuple[bool, int], int, str]:
    """What tensors of one kind share: how far back in their files they belong, bytes, and the beginning of an entry's JSON."""
    nbytes = tensor_bytes(dtype, shape)
    sizes = ",".join(map(str, shape))
    return (nbytes % PAGE != 0, -DTYPE_BITS[dtype]), nbytes, f'{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":'


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """tensor_bytes, known already of most tensors."""
    return _laid_out(dtype, shape)[1]


def in_order(tensors: Iterable[Described]) -> list[Described]:
    """(name, dtype, shape) triples as they lie in a file.

    Tensors of whole pages come first, so that these begin on page boundaries and can be written without the page cache. Then
    come wide dtypes, so that every tensor is aligned to its element; otherwise the given order stays.
    """
    return sorted(tensors, key=lambda tensor: _laid_out(tensor[1], tensor[2])[0])


def encode_header(ordered: Sequence[Described], metadata: Mapping[str, str]) -> bytes:
    """The header of a file in which these tensors lie one behind the other, padded with spaces to a page."""
    lines = [f'{{"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)}']
    position = 0
    for name, dtype, shape in ordered:
        _, nbytes, kind = _laid_out(dtype, shape)
        lines.append(f"{encode_basestring(name)}:{kind}[{position},{(position := position + nbytes)}]}}")
    text = f"{','.join(lines)}}}".encode()
    data_start = math.ceil((LENGTH.size + len(text)) / PAGE) * PAGE
    if data_start - LENGTH.size > MAX_HEADER_BYTES:
        raise KconvertError(
            f"a shard of {len(ordered)} tensors needs a header over {MAX_HEADER_BYTES} bytes; choose a smaller --shard-size"
        )
    return LENGTH.pack(data_start - LENGTH.size) + text.ljust(data_start - LENGTH.size)
