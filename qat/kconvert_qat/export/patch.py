"""What changed in a model since its last export, for rollouts that follow a training; see kconvert.run.state.patch.

Every weight is looked at; where its bits are others than last time it is encoded, and written if that has other bytes. What
these were only their digests tell, which the model keeps; so a patch follows an export of the same process. Files are small
enough to be held in memory until it is known what is in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from kconvert.checkpoint.files import exists, is_directory, write_file
from kconvert.checkpoint.listing import CONFIG_NAME
from kconvert.checkpoint.safetensors import encode_header, in_order
from kconvert.errors import KconvertError, explain_os_error
from kconvert.planning.containers import METADATA, Shard
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Place, Step
from kconvert.run.state.patch import FILE_NAME, PATCH_NAME, Patch
from kconvert.run.writer import ShardWriter
from kconvert_qat.export.encode import Encoded, Seen
from kconvert_qat.export.planned import Export
from kconvert_qat.names import base_model

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes

EXPORTED = "_kconvert_exported"
HELD = 256 << 20  # bytes of a file, or one weight


@dataclass(frozen=True)
class Exported:
    """An export: its id, what lies in it under which names, and what each weight was, on the rank that wrote it."""

    id: str
    outline: str
    seen: Mapping[str, Seen]

    @classmethod
    def of(cls, task: Export, seen: Mapping[str, Seen]) -> Exported:
        """An outline is equal where patches fit: the same tensors, of the same encodings by the same declaration."""
        config = json.loads(bytes(task.plan.texts[CONFIG_NAME]))
        tensors = [output for step in task.plan.steps for output in step.outputs]
        text = json.dumps([sorted(tensors), config.get("quantization_config")])
        return cls(task.id, hashlib.sha256(text.encode()).hexdigest(), seen)


def remember(model: nn.Module, exported: Exported) -> None:
    vars(base_model(model))[EXPORTED] = exported


def last_export(model: nn.Module) -> Exported:
    """KconvertError where there was none."""
    exported: Exported | None = vars(base_model(model)).get(EXPORTED)
    if exported is None:
        raise KconvertError(
            "a patch follows an export, but this process has not exported the model yet; export it whole first"
        )
    return exported


def check_room(directory: Path, overwrite: bool) -> None:
    """KconvertError where there is something, unless that is a patch which may be overwritten."""
    if not exists(directory):
        return
    if not is_directory(directory):
        raise KconvertError(f"{directory} is a file; give the patch a directory")
    there = sorted(path.name for path in directory.iterdir())
    others = [name for name in there if not (overwrite and _is_ours(name))]
    if others:
        raise KconvertError(f"{directory} is not empty ({others[0]}); a patch needs a directory of its own")


def _is_ours(name: str) -> bool:
    return name.startswith("patch") and name.endswith((".json", ".safetensors", ".part"))


@dataclass
class PatchWriter:
    """Writes what changed into a directory, a file whenever there is enough for one."""

    directory: Path
    most: int
    advance: Callable[[int], None]
    shards: list[Shard] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    _waiting: list[Encoded] = field(default_factory=list)
    _nbytes: int = 0

    def write(self, weights: Iterable[Encoded], last: Mapping[str, Seen]) -> dict[str, Seen]:
        """All that has other bytes than in the last export; returns what all weights were."""
        self._clear()
        seen: dict[str, Seen] = {}
        for weight in weights:
            seen[weight.step.name] = weight.seen
            if weight.seen.digest != last[weight.step.name].digest:
                self._add(weight)
        self._flush()
        return seen

    def finish(self, base: str, plan: Plan, export: str) -> Plan:
        """Make a whole patch of what was written; returns what was carried out of `plan`."""
        weight_map = {name: shard.name for shard in self.shards for name in shard.tensors}
        text = Patch(base, export, self.sha256, weight_map).to_json()
        write_file(self.directory / PATCH_NAME, self.directory / f"{PATCH_NAME}.part", text)
        return replace(plan, source=None, steps=tuple(self.steps), shards=tuple(self.shards), texts={PATCH_NAME: text})

    def _clear(self) -> None:
        """Take away an earlier patch, first what makes it whole."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in [self.directory / PATCH_NAME, *self.directory.glob("patch*")]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise explain_os_error(error, f"cannot write to {self.directory}") from None

    def _add(self, weight: Encoded) -> None:
        nbytes = sum(map(len, weight.parts))
        if self._waiting and self._nbytes + nbytes > self.most:
            self._flush()
        self._waiting.append(weight)
        self._nbytes += nbytes

    def _flush(self) -> None:
        """A file of what is waiting."""
        if not self._waiting:
            return
        name = FILE_NAME.format(number=len(self.shards) + 1)
        data = {
            output[0]: (output, part)
            for weight in self._waiting
            for output, part in zip(weight.step.outputs, weight.parts, strict=True)
        }
        ordered = in_order(output for output, _ in data.values())
        header = encode_header(ordered, METADATA)
        starts = self._write_file(name, header, [data[output[0]][1] for output in ordered])
        places = {output[0]: Place(name, start) for output, start in zip(ordered, starts, strict=True)}
        self.steps += [
            weight.step.placed(tuple(places[it[0]] for it in weight.step.outputs)) for weight in self._waiting
        ]
        nbytes = len(header) + sum(len(part) for _, part in data.values())
        self.shards.append(Shard(name, header, nbytes, tuple(output[0] for output in ordered)))
        self._waiting, self._nbytes = [], 0

    def _write_file(self, name: str, header: bytes, parts: list[Bytes]) -> list[int]:
        """Returns where each part begins."""
        digest, starts, position = hashlib.sha256(header), [], len(header)
        writer = ShardWriter(
            self.directory / name, self.directory / f"{name}.part", header, len(header) + sum(map(len, parts))
        )
        try:
            for part in parts:
                starts.append(position)
                digest.update(part.data)
                if len(part) and writer.write(part.data, position):
                    writer.commit()
                position += len(part)
                self.advance(len(part))
        finally:
            writer.abandon()
        self.sha256[name] = digest.hexdigest()
        return starts
