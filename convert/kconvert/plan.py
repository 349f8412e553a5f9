"""From a recipe and the source's headers to a Plan: what every byte of the output comes from. Reads no tensor data.

Names, offsets and shard numbers are fixed here, so the output's bytes depend on nothing that happens later.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from kconvert.checkpoint.header import layout, tensor_bytes
from kconvert.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint, Tensor
from kconvert.errors import KconvertError
from kconvert.formats import Format, Part
from kconvert.formats.amx import AmxCodes, AmxScales
from kconvert.formats.dense import Dense
from kconvert.formats.int8 import Int8
from kconvert.formats.packed import Packed
from kconvert.model import Model, Weight, format_counts, natural_key, parts_of, refuse_undecoded
from kconvert.recipe import Recipe
from kconvert.sorting import Plain
from kconvert.version import __version__

SHARD_NAME = "model-{number:05d}-of-{total:05d}.safetensors"
METADATA = {"format": "pt"}
FATES = ("lossless", "recovered", "lossy")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes begin: `start` counts from the beginning of `file`."""

    file: str
    start: int


@dataclass(frozen=True, slots=True)
class Transcode:
    """A weight [rows, cols] goes from one format to another; a place for each part, in the order of `format.parts`.

    `output` is its name there where that is another one than in the source.
    """

    name: str
    rows: int
    cols: int
    source: Format
    reads: tuple[Place, ...]
    target: Format
    writes: tuple[Place, ...] = ()
    output: str = ""

    @property
    def source_parts(self) -> tuple[Part, ...]:
        return parts_of(self.source, self.rows, self.cols)

    @property
    def target_parts(self) -> tuple[Part, ...]:
        return parts_of(self.target, self.rows, self.cols)

    @property
    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what it writes."""
        name = self.output or self.name
        return [(part.tensor_of(name), part.dtype, part.shape) for part in self.target_parts]

    def placed(self, writes: tuple[Place, ...]) -> Transcode:
        return Transcode(self.name, self.rows, self.cols, self.source, self.reads, self.target, writes, self.output)


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor keeps its name, dtype, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    reads: tuple[Place, ...]
    writes: tuple[Place, ...] = ()

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    @property
    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(self.name, self.dtype, self.shape)]

    def placed(self, writes: tuple[Place, ...]) -> Copy:
        return Copy(self.name, self.dtype, self.shape, self.reads, writes)


Step: TypeAlias = Transcode | Copy


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


@dataclass(frozen=True)
class Plan:
    """What will be done. `texts` are the small files written last, in this order, config.json and the index at its end.

    `recipe` says in words what was asked for, `facts` what a user wants to know; a synthetic sample has no `source`.
    """

    recipe: str
    source: Checkpoint | None
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes]
    facts: Mapping[str, Any]

    @property
    def side_files(self) -> Mapping[str, int]:
        return self.source.side_files if self.source else {}

    @cached_property
    def output_bytes(self) -> int:
        """Everything that will lie in DST, in bytes."""
        texts = sum(map(len, self.texts.values()))
        return sum(shard.nbytes for shard in self.shards) + sum(self.side_files.values()) + texts

    @cached_property
    def hash(self) -> str:
        """Stable over runs and machines: equal plans write equal bytes from equal sources."""
        digest = hashlib.sha256(f"{__version__} {self.recipe}".encode())
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.nbytes}".encode() + shard.header)
        # By identity: formats that are equal may still make codes by different rules, which belong to the plan.
        spelled: dict[int, str] = {}
        for step in self.steps:
            formats = (step.source, step.target) if isinstance(step, Transcode) else ()
            names = [spelled.get(id(f)) or spelled.setdefault(id(f), repr(f)) for f in formats]
            digest.update(f"{step.name} {names} {[(p.file, p.start) for p in step.reads]}".encode())
        for name, text in self.texts.items():
            digest.update(name.encode() + text)
        digest.update(repr(sorted(self.side_files.items())).encode())
        return digest.hexdigest()

    @cached_property
    def stamp(self) -> str:
        """Changes when the source's files do."""
        files = self.source.files if self.source else {}
        return hashlib.sha256(repr([(name, stat.stamp) for name, stat in files.items()]).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON: what `--dry-run --json` prints."""
        return {
            "plan": self.hash,
            **self.facts,
            "output_bytes": self.output_bytes,
            "shards": [{"name": s.name, "bytes": s.nbytes, "tensors": len(s.tensors)} for s in self.shards],
            "side_files": list(self.side_files),
        }


def make_plan(model: Model, recipe: Recipe) -> Plan:
    """Plan the conversion of `model`; KconvertError when the recipe does not fit it."""
    refuse_undecoded(model.select(recipe.include, recipe.exclude))
    recipe.check_source(model)
    model = model.select(recipe.include, recipe.exclude)
    steps, shards = place(list(_drafts(model, recipe)), recipe.shard_size)
    texts = final_texts(recipe.config(model), shards, model.parameters)
    facts = {
        "source": model.checkpoint.name,
        "manifest": model.manifest.name,
        "to": recipe.to,
        **({"layout": recipe.layout} if recipe.layout else {}),
        **({"scales": recipe.scales} if recipe.scales != "amax" else {}),
        "parameters": model.parameters,
        "weights": dict(format_counts(model.weights)),
        "read_bytes": sum(tensor.nbytes for weight in model.weights for tensor in weight.tensors)
        + sum(plain.tensor.nbytes for plain in model.plain),
        **count_steps(steps),
        "dropped": [tensor.name for tensor in _left_behind(model, recipe)],
        "left_out": list(model.checkpoint.left_out),
    }
    return Plan(repr(recipe), model.checkpoint, steps, shards, texts, facts)


def _left_behind(model: Model, recipe: Recipe) -> Iterator[Tensor]:
    """What describes activations: it goes along only where a weight's codes are copied as they are."""
    yield from model.dropped
    for weight in model.weights:
        if weight.companions and (isinstance(weight.format, Dense) or recipe.target(weight) is not None):
            yield from weight.companions


def count_steps(steps: Sequence[Step]) -> dict[str, Any]:
    """How many steps of each kind there are, and which conversions lose something."""
    transcoded = [step for step in steps if isinstance(step, Transcode)]
    return {
        "transcoded": len(transcoded),
        "copied": len(steps) - len(transcoded),
        **{fate: _pairs(step for step in transcoded if fate_of(step) == fate) for fate in FATES},
    }


def fate_of(step: Transcode) -> str:
    """What becomes of the weight's values. Their own dtype holds them all, and F32 holds those of any.

    `recovered`: where codes and a scale reproduce a group's values the output has these, and the run counts the others.
    """
    if isinstance(step.target, Dense) and step.target.dtype in ("F32", _dtype_of_values(step.source)):
        return "lossless"
    if isinstance(step.target, AmxCodes | AmxScales):
        return "lossless"
    return "recovered" if isinstance(step.target, Packed) and step.target.exact else "lossy"


def _dtype_of_values(format: Format) -> str:
    """Integers are multiplied in their scale's dtype; the values of all other encodings are bf16."""
    match format:
        case Dense():
            return format.dtype
        case Packed() | Int8():
            return format.scale_dtype
    return "BF16"


def _pairs(steps: Iterable[Transcode]) -> dict[str, int]:
    """How many weights go from which format to which."""
    return dict(Counter(f"{step.source.label} -> {step.target.label}" for step in steps))


def _drafts(model: Model, recipe: Recipe) -> Iterator[Step]:
    """A step without places for each weight and tensor, in natural order of the output's names."""
    items: list[Weight | Plain] = [*model.weights, *model.plain]
    items.sort(key=lambda item: natural_key(item.name if isinstance(item, Weight) else item.tensor.name))
    for item in items:
        if isinstance(item, Plain):
            yield _copy(item.tensor)
            continue
        target = recipe.target(item)
        if target is None:
            yield from map(_copy, item.copied)
        else:
            reads = tuple(Place(tensor.file, tensor.start) for tensor in item.tensors)
            yield Transcode(item.name, item.rows, item.cols, item.format, reads, target)


def _copy(tensor: Tensor) -> Copy:
    return Copy(tensor.name, tensor.dtype, tensor.shape, (Place(tensor.file, tensor.start),))


def place(
    drafts: Sequence[Step],
    shard_size: int,
    shard_name: str = SHARD_NAME,
    scatter: bool = False,
    metadata: Mapping[str, str] = METADATA,
) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    """Give every output tensor its shard and offset; shards hold at most `shard_size` bytes, or one weight.

    The tensors of one weight share a shard, unless `scatter` deals them to shards that follow one another.
    """
    numbers = _shard_numbers(drafts, shard_size)
    total = numbers[-1] + 1
    if scatter and total == 1:
        raise KconvertError(
            "all tensors fit into one shard, there is nothing to scatter; choose a smaller --shard-size"
        )
    contents: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(total)]
    for draft, number in zip(drafts, numbers, strict=True):
        for k, output in enumerate(draft.outputs):
            contents[(number + k * scatter) % total].append(output)
    shards = []
    places: dict[str, Place] = {}
    for number, content in enumerate(contents, start=1):
        if not content:
            raise KconvertError("a shard would be left without tensors; choose a larger --shard-size")
        name = shard_name.format(number=number, total=total)
        header, entries = layout(content, metadata)
        shards.append(Shard(name, header, entries[-1].start + entries[-1].nbytes, tuple(e.name for e in entries)))
        places.update((entry.name, Place(name, entry.start)) for entry in entries)
    if len(places) != sum(map(len, contents)):
        raise KconvertError(
            "two weights have the same name in the output; this is a fault of kconvert, please report it"
        )
    steps = tuple(draft.placed(tuple(places[name] for name, _, _ in draft.outputs)) for draft in drafts)
    return steps, tuple(shards)


def place_apart(
    drafts: Iterable[Step], file_of: Callable[[str, int], str]
) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    """Give every output tensor a file of its own without a header: `file_of` its name and size in bytes."""
    steps, shards = [], []
    for draft in drafts:
        sizes = [(name, tensor_bytes(dtype, shape)) for name, dtype, shape in draft.outputs]
        files = [Shard(file_of(name, nbytes), b"", nbytes, (name,)) for name, nbytes in sizes]
        steps.append(draft.placed(tuple(Place(file.name, 0) for file in files)))
        shards += files
    return tuple(steps), tuple(shards)


def _shard_numbers(drafts: Iterable[Step], shard_size: int) -> list[int]:
    numbers: list[int] = []
    number = filled = 0
    for draft in drafts:
        size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in draft.outputs)
        if filled and filled + size > shard_size:
            number, filled = number + 1, 0
        filled += size
        numbers.append(number)
    return numbers


def final_texts(config: Mapping[str, Any], shards: Iterable[Shard], parameters: int) -> dict[str, bytes]:
    """config.json and the index, which carries total_size in bytes of tensors and total_parameters."""
    shards = tuple(shards)
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    metadata = {"total_size": total, "total_parameters": parameters}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return {CONFIG_NAME: json_bytes(config), INDEX_NAME: json_bytes(index)}


def json_bytes(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
