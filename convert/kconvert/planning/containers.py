"""The files of an output: which tensor lies where in which of them, and what says so.

Names, offsets and shard numbers are fixed here, so the output's bytes depend on nothing that happens later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """One output file: its header (empty for a file that is one tensor's bytes) and its size in bytes, header included."""

    name: str
    header: bytes
    nbytes: int
    tensors: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether none of its tensors has an element."""
        return self.nbytes == len(self.header)


class Container(Protocol):
    """A kind of files that hold tensors."""

    def place(self, drafts: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
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

    def place(self, drafts: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
        """See Container."""
        outputs = list(_first_written(drafts))
        numbers = self._numbers(outputs)
        total = numbers[-1] + 1
        if self.scatter and total == 1:
            raise KconvertError(
                "all tensors fit into one shard, there is nothing to scatter; choose a smaller --shard-size"
            )
        contents: list[list[Described]] = [[] for _ in range(total)]
        for tensors, number in zip(outputs, numbers, strict=True):
            for k, tensor in enumerate(tensors):
                contents[(number + k * self.scatter) % total].append(tensor)
        del outputs  # headers and places are the peak of planning a large model
        shards = []
        places: dict[str, Place] = {}
        for number, content in enumerate(contents, start=1):
            if not content:
                raise KconvertError("a shard would be left without tensors; choose a larger --shard-size")
            name = self.shard_name.format(number=number, total=total)
            header, entries = layout(content, self.metadata)
            shards.append(Shard(name, header, entries[-1].start + entries[-1].nbytes, tuple(e.name for e in entries)))
            places.update((entry.name, Place(name, entry.start)) for entry in entries)
        if len(places) != sum(map(len, contents)):
            raise KconvertError(
                "two weights have the same name in the output; this is a fault of kconvert, please report it"
            )
        return tuple(draft.placed(_places_of(draft, places)) for draft in drafts), tuple(shards)

    def _numbers(self, outputs: Iterable[list[Described]]) -> list[int]:
        """The shard of what each draft writes, counted from 0."""
        numbers: list[int] = []
        number = filled = 0
        for tensors in outputs:
            size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in tensors)
            if filled and filled + size > self.shard_size:
                number, filled = number + 1, 0
            filled += size
            numbers.append(number)
        return numbers

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, bytes]:
        """config.json and the index, which carries total_size in bytes of tensors and total_parameters."""
        shards = tuple(shards)
        total = sum(shard.nbytes - len(shard.header) for shard in shards)
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        metadata = {"total_size": total, "total_parameters": parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        return {CONFIG_NAME: json_bytes(config), INDEX_NAME: json_bytes(index)}


def _first_written(drafts: Iterable[Step]) -> Iterator[list[Described]]:
    """The tensors that each draft writes, but for those that one before it writes another matrix of."""
    stacks: set[str] = set()
    for draft in drafts:
        tensors = draft.outputs
        if draft.slot is not None:
            tensors = [tensor for tensor in tensors if tensor[0] not in stacks]
            stacks.update(name for name, _, _ in tensors)
        yield tensors


def _places_of(draft: Step, places: Mapping[str, Place]) -> tuple[Place, ...]:
    slot = draft.slot
    if slot is None:
        return tuple(places[name] for name, _, _ in draft.outputs)
    wholes = [(places[name], tensor_bytes(dtype, shape)) for name, dtype, shape in draft.outputs]
    return tuple(Place(place.file, place.start + nbytes // slot.count * slot.index) for place, nbytes in wholes)


@dataclass(frozen=True, slots=True)
class Apart:
    """A file for every tensor, its bytes and nothing else; `file_of` says the name, from the tensor's and its size in bytes."""

    file_of: Callable[[str, int], str]

    def place(self, drafts: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
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


def json_bytes(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
