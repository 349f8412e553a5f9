"""GGUF files: metadata and the names, shapes and types of the tensors, then their bytes, each at a multiple of 32.

The bytes before the tensors are those that the `gguf` package writes. What would be larger than a shard may be is split as
llama.cpp's `gguf-split` does: `name-00001-of-00003.gguf`, the metadata in the first, and the tensors of each in its own.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.safetensors import Described
from kconvert.errors import KconvertError
from kconvert.formats.dtypes import tensor_bytes
from kconvert.planning.containers import Shard, first_written, placed, shard_numbers, sizes_of
from kconvert.planning.steps import Place, Step
from kconvert.planning.texts import Text

if TYPE_CHECKING:
    from gguf.gguf_writer import GGUFValue

ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Gguf:
    """`name.gguf`, or shards of about `shard_size` bytes; `metadata` are the keys and values of the first."""

    name: str
    shard_size: int
    metadata: Mapping[str, GGUFValue] = field(repr=False)

    def place(self, drafts: Iterable[Step]) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
        """See containers.Container."""
        steps = list(drafts)
        outputs = list(first_written(steps, set()))
        numbers = shard_numbers(sizes_of(steps), self.shard_size)
        contents: list[list[Described]] = [[] for _ in range(numbers[-1] + 1)]
        for number, tensors in zip(numbers, outputs, strict=True):
            contents[number] += tensors
        names = [name for content in contents for name, _, _ in content]
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise KconvertError(f"two tensors would be {twice!r} in the output; use --exclude for one of them")
        shards, starts = [], {}
        for number, content in enumerate(contents):
            shard, places = self._shard(number, contents, content)
            shards.append(shard)
            starts.update(places)
        stacks: dict[str, Place] = {}
        for i, tensors in enumerate(outputs):
            steps[i] = placed(steps[i], [starts[name] for name, _, _ in tensors], stacks)
        return tuple(steps), tuple(shards)

    def texts(self, config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, Text]:
        """None: what config.json says is in the metadata."""
        return {}

    def _shard(
        self, number: int, contents: list[list[Described]], content: list[Described]
    ) -> tuple[Shard, dict[str, Place]]:
        """The shard of these tensors, and the place of each of them."""
        total = len(contents)
        name = f"{self.name}.gguf" if total == 1 else f"{self.name}-{number + 1:05d}-of-{total:05d}.gguf"
        header = self._header(number, total, sum(map(len, contents)), content)
        position, padding, places = len(header), 0, {}
        for tensor, dtype, shape in content:
            places[tensor] = Place(name, position)
            nbytes = tensor_bytes(dtype, shape)
            rest = -nbytes % ALIGNMENT
            position, padding = position + nbytes + rest, padding + rest
        return Shard(name, header, position, tuple(places), padding), places

    def _header(self, number: int, total: int, tensors: int, content: Iterable[Described]) -> bytes:
        """All that comes before the data, which begins at a multiple of ALIGNMENT."""
        from gguf import GGMLQuantizationType, GGUFWriter
        from gguf.gguf_writer import WriterState

        writer = GGUFWriter(None, "")
        writer.kv_data = [dict(self.metadata) if number == 0 else {}]
        if total > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", total)
            writer.add_int32("split.tensors.count", tensors)
        for name, dtype, shape in content:
            type_ = GGMLQuantizationType[dtype]
            writer.add_tensor_info(name, shape, None, tensor_bytes(dtype, shape), type_)  # type: ignore[arg-type]
        file = BytesIO()
        writer.fout, writer.state = [file], WriterState.EMPTY  # type: ignore[list-item]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        header = file.getvalue()
        return header + bytes(-len(header) % ALIGNMENT)
