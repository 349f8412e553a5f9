"""A patch: the weights of an export that are others than in the export before, and what it may be merged into.

A directory with files of tensors under the checkpoint's own names, `patch-00001.safetensors` and so on, and, written last,
`patch.json`:

| key | |
|---|---|
| `base` | the export that it follows, as metadata.export of its model.safetensors.index.json says |
| `export` | which one it makes of that |
| `sha256` | file -> the digest of all of it |
| `weight_map` | tensor -> file |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kconvert.checkpoint.download import feed
from kconvert.checkpoint.files import is_directory
from kconvert.checkpoint.listing import Listing
from kconvert.checkpoint.safetensors import Tensor, read_header
from kconvert.checkpoint.source import Reader
from kconvert.errors import KconvertError, explain_os_error

PATCH_NAME = "patch.json"
FILE_NAME = "patch-{number:05d}.safetensors"
PIECE = 8 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class Patch:
    """What patch.json says."""

    base: str
    export: str
    sha256: Mapping[str, str]
    weight_map: Mapping[str, str]

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def read(cls, root: Path) -> Patch:
        """KconvertError where `root` holds no patch, or one that was not finished."""
        if not is_directory(root):
            raise KconvertError(f"{root} is no directory; give the one to which the patch was exported")
        try:
            table = Listing(root, {}, lambda name: (root / name).read_bytes()).json(PATCH_NAME)
        except FileNotFoundError:
            raise KconvertError(
                f"{root} has no {PATCH_NAME}, which is written last; it is no patch, or one that was not finished"
            ) from None
        except OSError as error:
            raise explain_os_error(error, f"cannot read {root / PATCH_NAME}") from None
        if not _is_sound(table):
            raise KconvertError(f"{root / PATCH_NAME} is not what an export writes; export the patch again")
        return cls(**table)

    def tensors(self, root: Path, reader: Reader) -> dict[str, Tensor]:
        """Every tensor in the files; KconvertError where these are not those of patch.json."""
        found: dict[str, Tensor] = {}
        for file in self.sha256:
            size = size_of(root / file)
            found |= {
                tensor.name: tensor for tensor in read_header(str(root / file), size, partial(reader.read, file), file)
            }
        if {name: tensor.file for name, tensor in found.items()} != self.weight_map:
            raise KconvertError(f"{root / PATCH_NAME} lists other tensors than its files have; copy the patch again")
        return found

    def check(self, root: Path) -> None:
        """Read everything; KconvertError for a file that is not as it was written."""
        for file, known in self.sha256.items():
            digest = hashlib.sha256()
            try:
                feed(digest.update, root / file)
            except OSError as error:
                raise explain_os_error(error, f"cannot read {root / file}") from None
            if digest.hexdigest() != known:
                raise KconvertError(f"{root / file} is not as it was written; copy the patch again")


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise KconvertError(f"{path} is missing; copy the patch again") from None
    except OSError as error:
        raise explain_os_error(error, f"cannot read {path}") from None


def _is_sound(table: Mapping[str, Any]) -> bool:
    """Nothing in it may lead out of the directory."""
    if table.keys() != Patch.__dataclass_fields__.keys() or not all(
        isinstance(table[key], str) for key in ("base", "export")
    ):
        return False
    maps = [table["sha256"], table["weight_map"]]
    if not all(isinstance(each, dict) and all(isinstance(value, str) for value in each.values()) for each in maps):
        return False
    names = set(table["sha256"])
    return (
        names == {FILE_NAME.format(number=number + 1) for number in range(len(names))}
        and set(maps[1].values()) <= names
    )


def signed(index: bytes, export: str) -> bytes:
    """An index that says of which export it is."""
    table = json.loads(index)
    table["metadata"]["export"] = export
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def export_of(index: Mapping[str, Any]) -> str | None:
    """Of which export an index is; None of other checkpoints."""
    metadata = index.get("metadata")
    export = metadata.get("export") if isinstance(metadata, dict) else None
    return export if isinstance(export, str) else None
