"""A model in GGUF: one file, or several that split it, as a checkpoint.

Parts are called `name-00001-of-00003.gguf` and say `split.no` (from 0), `split.count` and `split.tensors.count`, the tensors of
all of them; the first has the metadata of the model. Source: https://github.com/ggml-org/llama.cpp, `tools/gguf-split`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kconvert.checkpoint.directory import check_link
from kconvert.checkpoint.files import is_directory
from kconvert.checkpoint.gguf import MAGIC, Array, Header, Value, read_array, read_gguf
from kconvert.checkpoint.listing import FileStat, what_finishes
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint, Reader
from kconvert.errors import KconvertError, explain_os_error

SUFFIX = ".gguf"
PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})[.]gguf", re.DOTALL)
PROJECTOR = "mmproj"  # what the file of a vision tower begins with, which llama.cpp has apart


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """`files` are the parts, in order; nothing that lies beside them belongs to it. `kinds` are the types of the metadata's
    values, by number, `given` is the directory or the file by which it was named."""

    metadata: Mapping[str, Value]
    kinds: Mapping[str, int]
    given: Path

    @property
    def name(self) -> str:
        return next(iter(self.files))

    @property
    def title(self) -> Path:
        return self.root / self.name

    @property
    def untouched(self) -> Path:
        return self.given

    @property
    def architecture(self) -> str:
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) and found.isprintable() and len(found) < 100 else "unknown"

    def has(self, name: str) -> bool:
        return False

    def items(self, key: str) -> list[Any] | None:
        """The list under a key of the metadata; None where there is none, or one of lists."""
        value = self.metadata.get(key)
        if not isinstance(value, Array):
            return None
        with self.reader() as reader:
            size = self.files[self.name].nbytes
            return read_array(str(self.root / self.name), size, partial(reader.read, self.name), value)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether it is a GGUF file, by its name or its first letters, or a directory with such and without safetensors files."""
    place = Path(path)
    if place.is_file():
        return place.name.lower().endswith(SUFFIX) or _begins_so(place)
    if not place.is_dir():
        return False
    names = [name.lower() for name in os.listdir(place)]
    return any(name.endswith(SUFFIX) for name in names) and not any(name.endswith(".safetensors") for name in names)


def _begins_so(path: Path) -> bool:
    """Blobs of caches have no names that would tell."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: str | os.PathLike[str]) -> GgufCheckpoint:
    """Read the headers of the model in `path`: a file, any of its parts, or the directory of one model.

    KconvertError for whatever is not whole or not sound, and naming the part that is missing.
    """
    place = Path(os.path.abspath(path))
    try:
        first = _model_of(place) if is_directory(place) else place.name
        root = place if is_directory(place) else place.parent
        names = _parts(root, first)
        files = {name: _look(root, name) for name in names}
        with Reader(root) as reader:
            headers = [
                read_gguf(str(root / name), files[name].nbytes, partial(reader.read, name), name) for name in names
            ]
    except OSError as error:
        raise explain_os_error(error, f"cannot read {error.filename or path}") from None
    _check_parts(root, names, headers)
    tensors: dict[str, Tensor] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensors.setdefault(tensor.name, tensor) is not tensor:
                raise KconvertError(
                    f"{root / tensor.file}: tensor {tensor.name!r} is here and in {tensors[tensor.name].file}; they are not "
                    "parts of one model, fetch them again"
                )
    head = headers[0]
    return GgufCheckpoint(root, {}, tensors, files, {}, (), metadata=head.metadata, kinds=head.kinds, given=place)


def _model_of(root: Path) -> str:
    """The first file of the only model in a directory."""
    found = sorted(name for name in os.listdir(root) if name.lower().endswith(SUFFIX))
    models = {name: PART.fullmatch(name) for name in found if not name.startswith(PROJECTOR)}
    firsts = {(match[1], match[3]) if match else (name, ""): name for name, match in reversed(models.items())}
    if len(firsts) != 1:
        what = f"several models ({' or '.join(sorted(firsts.values())[:3])})" if firsts else "no model in GGUF"
        raise KconvertError(f"{root} holds {what}; give the file that is meant")
    return next(iter(firsts.values()))


def _parts(root: Path, name: str) -> list[str]:
    """All files of the model that `name` is one of."""
    match = PART.fullmatch(name)
    if match is None:
        return [name]
    total = int(match[3])
    names = [f"{match[1]}-{number:05d}-of-{match[3]}{SUFFIX}" for number in range(1, total + 1)]
    finishes = what_finishes(root)
    help = f"{finishes}, or if that does not make it, fetch it" if finishes else "fetch it"
    for part in names:
        if not os.path.lexists(root / part):
            raise KconvertError(f"{root / part} is missing, a part of the model that {name} is one of; {help}")
    if name not in names:
        raise KconvertError(f"{root / name} is numbered beyond the {total} parts of its model; give its first part")
    return names


def _look(root: Path, name: str) -> FileStat:
    path = root / name
    if path.is_symlink():
        check_link(root, path)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise KconvertError(f"{path} is not a file; give a GGUF file")
    return FileStat(found.st_size, f"{found.st_size}:{found.st_mtime_ns}")


def _check_parts(root: Path, names: list[str], headers: list[Header]) -> None:
    """KconvertError unless each file is the part that its name says, and they have all tensors together."""
    for number, (name, header) in enumerate(zip(names, headers, strict=True)):
        count, part = _number(header, "split.count"), _number(header, "split.no")
        if (part, count) != (number, len(names)) and not (len(names) == 1 and count in (None, 0, 1)):
            raise KconvertError(
                f"{root / name} says that it is part {part} (from 0) of {count}, but its name makes it part {number} of "
                f"{len(names)}; give the files the names that llama-gguf-split gives them"
            )
    wanted, found = _number(headers[0], "split.tensors.count"), sum(len(header.tensors) for header in headers)
    if len(names) > 1 and wanted not in (None, found):
        raise KconvertError(
            f"{root / names[0]} says that its model has {wanted} tensors, but its {len(names)} parts have {found}; fetch them "
            "again"
        )


def _number(header: Header, key: str) -> int | None:
    value = header.metadata.get(key)
    return value if isinstance(value, int) else None
