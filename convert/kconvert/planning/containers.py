"""The files of an output: which tensor lies where in which of them, and what says so.

Names, offsets and shard numbers are fixed here, so the output's bytes depend on nothing that happens later.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby, repeat
from json.encoder import encode_basestring
from typing import Any, Protocol

from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, SHARD_NAME
from kconvert.checkpoint.safetensors import Described, encode_header, in_order, size_of
from kconvert.errors import KconvertError
from kconvert.formats.dtypes import tensor_bytes
from kconvert.planning.steps import Place, Step, Transcode
from kconvert.planning.texts import Made, Text, digest_of

METADATA = {"format": "pt"}
LINES, SEPARATOR = 4096, ",\n    "  # of the index
FORMS = ("safetensors", "kt")  # of AMX weights: Safetensors, and Apart in a tree of .kt files


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: what is its header (empty for a file that is one tensor's bytes) and its size in bytes, header included.

    `padding` of these are zeros between the tensors and behind them, which no step writes.
    """

    name: str
    text: Text
    nbytes: int
    tensors: tuple[str, ...]
    padding: int = 0

    @property
    def header(self) -> bytes:
        return bytes(self.text)

    @property
    def digest(self) -> bytes:
        """The header's SHA-256."""
        return digest_of(self.text)

    @property
    def is_empty(self) -> bool:
        """Whether none of its tensors has an element."""
        return self.nbytes == len(self.text) + self.padding


class Container(Protocol):
    """A kind of files that hold tensors."""

    def place(self, drafts: Iterable[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
        """Give every output tensor its file and offset."""
        ...

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, Text]:
        """config.json and what lists the tensors, in the order in which they are written."""
        ...


@dataclass(frozen=True, slots=True)
class Safetensors:
    """Shards of at most `shard_size` bytes, or one weight, with an index.

    The tensors of one weight share a shard, as do the matrices of a stack, unless `scatter` deals them to shards that follow
    one another. `metadata` goes into every header.
    """

    shard_size: int
    shard_name: str = SHARD_NAME
    scatter: bool = False
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)

    def place(self, drafts: Iterable[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
        """See Container."""
        steps = list(drafts)
        numbers = shard_numbers(sizes_of(steps), self.shard_size)
        total = numbers[-1] + 1
        if self.scatter and total == 1:
            raise KconvertError(
                "all tensors fit into one shard, there is nothing to scatter; choose a smaller --shard-size"
            )
        shards: dict[int, Shard] = {}
        stacks: dict[str, Place] = {}
        # Shard by shard: what is known of one tensor after the other would be the peak of planning a large model.
        for group in [range(len(steps))] if self.scatter else _runs(numbers):
            self._place(steps, group, numbers, shards, stacks)
        if len(shards) < total:
            raise KconvertError("a shard would be left without tensors; choose a larger --shard-size")
        return tuple(steps), tuple(shards[number] for number in range(total))

    def _place(
        self, steps: list[Step], group: range, numbers: list[int], shards: dict[int, Shard], stacks: dict[str, Place]
    ) -> None:
        """Make the shards of these steps, whose tensors are in no others, and give them their places."""
        total = numbers[-1] + 1
        outputs = list(first_written((steps[i] for i in group), set(stacks)))
        contents: dict[int, list[Described]] = defaultdict(list)
        for i, tensors in zip(group, outputs, strict=True):
            for k, tensor in enumerate(tensors):
                contents[(numbers[i] + k * self.scatter) % total].append(tensor)
        places: dict[int, Iterator[Place]] = {}  # of what is in a shard, in the order in which it was put there
        for number, content in contents.items():
            name = self.shard_name.format(number=number + 1, total=total)
            shards[number], found = self._shard(name, content)
            places[number] = iter(found)
        for i, tensors in zip(group, outputs, strict=True):
            writes = [next(places[(numbers[i] + k * self.scatter) % total]) for k in range(len(tensors))]
            steps[i] = placed(steps[i], writes, stacks)

    def _shard(self, name: str, content: list[Described]) -> tuple[Shard, list[Place]]:
        """The shard of these tensors, and the place of each of them."""
        ordered = in_order(content)
        names, dtypes, shapes = map(tuple, zip(*ordered, strict=True))
        kinds = tuple(map(_shared, dtypes, shapes))
        header = Made(partial(_header, names, kinds, self.metadata))
        starts, position = {}, len(header)
        for tensor, dtype, shape in ordered:
            starts[tensor] = position
            position += size_of(dtype, shape)
        shard = Shard(name, header, position, names)
        return shard, [Place(name, starts[tensor]) for tensor, _, _ in content]

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, Text]:
        """config.json and the index, which carries total_size in bytes of tensors and total_parameters."""
        shards = tuple(shards)
        total = sum(shard.nbytes - len(shard.text) for shard in shards)
        metadata = {"total_size": total, "total_parameters": parameters}
        return {CONFIG_NAME: json_bytes(config), INDEX_NAME: Made(partial(_index, metadata, shards))}


@lru_cache(maxsize=4096)
def _shared(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The two as one object for all tensors of a kind."""
    return dtype, shape


def _header(
    names: Iterable[str], kinds: Iterable[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Iterator[bytes]:
    yield encode_header([(name, *kind) for name, kind in zip(names, kinds, strict=True)], metadata)


def shard_numbers(sizes: Iterable[int], shard_size: int) -> list[int]:
    """The shard of each draft, counted from 0, by how many bytes it is the first to write."""
    numbers: list[int] = []
    number = filled = 0
    for size in sizes:
        if filled and filled + size > shard_size:
            number, filled = number + 1, 0
        filled += size
        numbers.append(number)
    return numbers


def sizes_of(drafts: Iterable[Step]) -> Iterator[int]:
    """How many bytes each draft is the first to write."""
    stacks: set[str] = set()
    known: dict[tuple[int, int, int], int] = {}  # of weights of one kind, by the identity of their format
    for draft in drafts:
        if draft.slot is not None:
            (tensors,) = first_written([draft], stacks)
            yield sum(tensor_bytes(dtype, shape) for _, dtype, shape in tensors)
        elif isinstance(draft, Transcode):
            kind = id(draft.target), draft.rows, draft.cols
            if kind not in known:
                known[kind] = sum(part.nbytes for part in draft.target_parts)
            yield known[kind]
        else:
            yield draft.nbytes


def _runs(numbers: list[int]) -> Iterator[range]:
    """The drafts of each shard."""
    begin = 0
    for _, group in groupby(numbers):
        end = begin + len(list(group))
        yield range(begin, end)
        begin = end


def first_written(drafts: Iterable[Step], stacks: set[str]) -> Iterator[list[Described]]:
    """The tensors that each draft writes, but for those that one before it writes another matrix of, which are in `stacks`."""
    for draft in drafts:
        tensors = draft.outputs
        if draft.slot is not None:
            tensors = [tensor for tensor in tensors if tensor[0] not in stacks]
            stacks.update(name for name, _, _ in tensors)
        yield tensors


def placed(draft: Step, writes: list[Place], stacks: dict[str, Place]) -> Step:
    """The step with its places; of a slot, `writes` are those of what it is the first to write into, which go into `stacks`."""
    if (slot := draft.slot) is None:
        return draft.placed(tuple(writes))
    tensors = draft.outputs
    stacks.update(zip((name for name, _, _ in tensors if name not in stacks), writes, strict=True))
    wholes = [(stacks[name], tensor_bytes(dtype, shape)) for name, dtype, shape in tensors]
    return draft.placed(tuple(Place(file, start + size // slot.count * slot.index) for (file, start), size in wholes))


@dataclass(frozen=True, slots=True)
class Apart:
    """A file for every tensor, its bytes and nothing else; `file_of` says the name, from the tensor's and its size in bytes."""

    file_of: Callable[[str, int], str]

    def place(self, drafts: Iterable[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
        """See Container."""
        steps, shards = [], []
        for draft in drafts:
            sizes = [(name, tensor_bytes(dtype, shape)) for name, dtype, shape in draft.outputs]
            files = [Shard(self.file_of(name, nbytes), b"", nbytes, (name,)) for name, nbytes in sizes]
            steps.append(draft.placed(tuple(Place(file.name, 0) for file in files)))
            shards += files
        return tuple(steps), tuple(shards)

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, Text]:
        """config.json; the files' names say the rest."""
        return {CONFIG_NAME: json_bytes(config)}


def _index(metadata: Mapping[str, Any], shards: Sequence[Shard]) -> Iterator[bytes]:
    """As json_bytes spells it, with sorted names, but bit by bit: half a million take json seconds and twice the memory."""
    names = [name for shard in shards for name in shard.tensors]
    files = [file for shard in shards for file in repeat(encode_basestring(shard.name), len(shard.tensors))]
    head, tail = json_bytes({"metadata": metadata, "weight_map": {"": ""}}).split(b'"": ""')
    yield head
    order = sorted(range(len(names)), key=names.__getitem__)
    comma, before = "", None
    for begin in range(0, len(order), LINES):
        lines = []
        for i in order[begin : begin + LINES]:
            if (name := names[i]) == before:
                raise KconvertError(
                    "two weights have the same name in the output; this is a fault of kconvert, please report it"
                )
            lines.append(f"{encode_basestring(name)}: {files[i]}")
            before = name
        yield f"{comma}{SEPARATOR.join(lines)}".encode()
        comma = SEPARATOR
    yield tail


def json_bytes(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
