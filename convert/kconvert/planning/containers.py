"""The files of an output: which tensor lies where in which of them, and what says so.

Names, offsets and shard numbers are fixed here, so the output's bytes depend on nothing that happens later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import SEEK_END, BytesIO
from json.encoder import encode_basestring
from typing import Any, Protocol

from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, SHARD_NAME
from kconvert.checkpoint.safetensors import layout
from kconvert.errors import KconvertError
from kconvert.formats.dtypes import tensor_bytes
from kconvert.planning.steps import Described, Place, Step

METADATA = {"format": "pt"}
FORMS = ("safetensors", "kt")  # of AMX weights: Safetensors, and Apart in a tree of .kt files


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its header (empty for a file that is one tensor's bytes) and its size in bytes, header included.

    `padding` of these are zeros between the tensors and behind them, which no step writes.
    """

    name: str
    header: bytes
    nbytes: int
    tensors: tuple[str, ...]
    padding: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether none of its tensors has an element."""
        return self.nbytes == len(self.header) + self.padding


class Container(Protocol):
    """A kind of files that hold tensors."""

    def place(self, drafts: Iterable[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
        """Give every output tensor its file and offset."""
        ...

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, bytes]:
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
        outputs = list(first_written(steps))
        numbers = shard_numbers(outputs, self.shard_size)
        total = numbers[-1] + 1
        if self.scatter and total == 1:
            raise KconvertError(
                "all tensors fit into one shard, there is nothing to scatter; choose a smaller --shard-size"
            )
        contents: list[list[Described]] = [[] for _ in range(total)]
        for number, tensors in zip(numbers, outputs, strict=True):
            for k, tensor in enumerate(tensors):
                contents[(number + k * self.scatter) % total].append(tensor)
        counts = [len(tensors) for tensors in outputs]
        del outputs  # headers and places are the peak of planning a large model
        shards: list[Shard] = []
        places: list[Iterator[Place]] = []  # of what is in a shard, in the order in which it was put there
        for number, content in enumerate(contents, start=1):
            if not content:
                raise KconvertError("a shard would be left without tensors; choose a larger --shard-size")
            shard, found = self._shard(self.shard_name.format(number=number, total=total), content)
            shards.append(shard)
            places.append(iter(found))
            content.clear()
        stacks: dict[str, Place] = {}
        for i, (number, count) in enumerate(zip(numbers, counts, strict=True)):
            writes = [next(places[(number + k * self.scatter) % total]) for k in range(count)]
            steps[i] = placed(steps[i], writes, stacks)
        return tuple(steps), tuple(shards)

    def _shard(self, name: str, content: list[Described]) -> tuple[Shard, list[Place]]:
        """The shard of these tensors, and the place of each of them."""
        header, tensors = layout(content, self.metadata)
        starts = {tensor.name: tensor.start for tensor in tensors}
        names = tuple([tensor.name for tensor in tensors])
        shard = Shard(name, header, tensors[-1].start + tensors[-1].nbytes, names)
        return shard, [Place(name, starts[tensor]) for tensor, _, _ in content]

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, bytes]:
        """config.json and the index, which carries total_size in bytes of tensors and total_parameters."""
        shards = tuple(shards)
        total = sum(shard.nbytes - len(shard.header) for shard in shards)
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        if len(weight_map) != sum(len(shard.tensors) for shard in shards):
            raise KconvertError(
                "two weights have the same name in the output; this is a fault of kconvert, please report it"
            )
        metadata = {"total_size": total, "total_parameters": parameters}
        return {CONFIG_NAME: json_bytes(config), INDEX_NAME: _index_bytes(metadata, weight_map)}


def shard_numbers(outputs: Iterable[list[Described]], shard_size: int) -> list[int]:
    """The shard of what each draft writes, counted from 0."""
    numbers: list[int] = []
    number = filled = 0
    for tensors in outputs:
        size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in tensors)
        if filled and filled + size > shard_size:
            number, filled = number + 1, 0
        filled += size
        numbers.append(number)
    return numbers


def first_written(drafts: Iterable[Step]) -> Iterator[list[Described]]:
    """The tensors that each draft writes, but for those that one before it writes another matrix of."""
    stacks: set[str] = set()
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

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, bytes]:
        """config.json; the files' names say the rest."""
        return {CONFIG_NAME: json_bytes(config)}


def _index_bytes(metadata: Mapping[str, Any], weight_map: Mapping[str, str]) -> bytes:
    """As json_bytes spells it, with sorted names, but line by line: half a million take json seconds and twice the memory."""
    head, tail = json_bytes({"metadata": metadata, "weight_map": {"": ""}}).split(b'"": ""')
    text, comma, quoted = BytesIO(head), "", cache(encode_basestring)
    text.seek(0, SEEK_END)
    for name in sorted(weight_map):
        text.write(f"{comma}{encode_basestring(name)}: {quoted(weight_map[name])}".encode())
        comma = ",\n    "
    text.write(tail)
    return text.getvalue()


def json_bytes(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
