"""A patch merged into an export, in place, so that it never looks whole while it is neither the one nor the other.

config.json and the index, without which nobody takes a directory for a checkpoint, lie in DST/.kconvert/merge from the first
byte that is written until the last one is on the disk; `merge.json` beside them says which patch it was. The patch is the
record of what is to be done, so that the same command goes on wherever another was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kconvert.checkpoint.files import exists, is_directory, sync_directory, write_at, write_file
from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, STATE_DIR, Listing
from kconvert.checkpoint.safetensors import Tensor, read_header
from kconvert.checkpoint.source import Reader
from kconvert.errors import KconvertError, explain_os_error
from kconvert.run.state.journal import MERGE
from kconvert.run.state.locks import LOCK, hold
from kconvert.run.state.patch import PIECE, Patch, export_of, signed

STATE_NAME = "merge.json"
MARKS = (CONFIG_NAME, INDEX_NAME)  # what makes a checkpoint of a directory
THREADS = 8


@dataclass(frozen=True)
class Applied:
    """How many tensors of how many bytes were replaced, and whether that had been done `before`."""

    tensors: int
    nbytes: int
    before: bool = False


def apply_patch(destination: Path, root: Path) -> Applied:
    """Merge the patch in `root` into `destination`; see kconvert.apply."""
    patch = Patch.read(root)
    if not is_directory(destination):
        raise KconvertError(f"{destination} is no directory; give the export that the patch follows")
    busy = f"another kconvert is writing to {destination}; wait for it"
    try:
        with hold(destination / STATE_DIR / LOCK, busy), Reader(root) as reader:
            merge = Merge(destination, root, patch)
            merge.tidy()
            if merge.is_done():
                return Applied(len(patch.weight_map), 0, before=True)
            index = merge.base_index()
            moves = list(_moves(destination, root, index, patch.tensors(root, reader)))
            patch.check(root)
            merge.begin()
            _write(destination, reader, moves)
            merge.finish(index)
            return Applied(len(moves), sum(tensor.nbytes for tensor, _ in moves))
    except OSError as error:
        raise explain_os_error(error, f"cannot write to {destination}") from None


@dataclass(frozen=True)
class Merge:
    """What DST says of this patch, which another merge may have begun."""

    destination: Path
    root: Path
    patch: Patch

    @property
    def folder(self) -> Path:
        return self.destination / STATE_DIR / MERGE

    @property
    def is_whole(self) -> bool:
        """Whether DST has its marks: before the first byte was written, or after the last."""
        return all((self.destination / name).is_file() for name in MARKS)

    def tidy(self) -> None:
        """Forget a merge that was stopped before the one or after the other."""
        if self.is_whole:
            shutil.rmtree(self.folder, ignore_errors=True)

    def is_done(self) -> bool:
        """Whether DST is a whole checkpoint with the patch in it."""
        return self.is_whole and export_of(_index(self.destination)) == self.patch.export

    def base_index(self) -> Mapping[str, Any]:
        """The index that DST has, or had before it was taken away; KconvertError where the patch is for another export."""
        begun = _state(self.folder)
        if begun is not None and begun != [self.patch.base, self.patch.export]:
            raise KconvertError(
                f"{self.destination} is half-merged with another patch than {self.root}; run `kconvert apply` with that again"
            )
        holder = self.destination if exists(self.destination / INDEX_NAME) else self.folder
        if not exists(holder / INDEX_NAME):
            raise KconvertError(
                f"{self.destination} has no {INDEX_NAME}; give the directory of a whole export, which was finished"
            )
        index = _index(holder)
        if begun is None and not exists(self.destination / CONFIG_NAME):
            raise KconvertError(f"{self.destination} has no {CONFIG_NAME}; the export into it was not finished")
        if export_of(index) not in {self.patch.base, *([self.patch.export] if begun else [])}:
            raise KconvertError(
                f"{self.root} is a patch for another export than is in {self.destination}; apply all patches since in their "
                "order, or export the whole model again"
            )
        return index

    def begin(self) -> None:
        """From now on DST is no checkpoint."""
        self.folder.mkdir(exist_ok=True)
        state = json.dumps([self.patch.base, self.patch.export]).encode()
        write_file(self.folder / STATE_NAME, self.folder / f"{STATE_NAME}.part", state)
        for name in MARKS:
            if (self.destination / name).exists():
                os.replace(self.destination / name, self.folder / name)
        for folder in (self.folder, self.folder.parent, self.destination):
            sync_directory(folder)

    def finish(self, index: Mapping[str, Any]) -> None:
        """It is the patch's export."""
        text = signed(json.dumps(index).encode(), self.patch.export)
        write_file(self.destination / INDEX_NAME, self.folder / f"{INDEX_NAME}.part", text)
        os.replace(self.folder / CONFIG_NAME, self.destination / CONFIG_NAME)
        sync_directory(self.destination)
        self.tidy()


def _state(folder: Path) -> Any:
    """What the merge that was begun had to do; None where there is none."""
    if not exists(folder / STATE_NAME):
        return None
    try:
        return json.loads((folder / STATE_NAME).read_bytes())
    except ValueError:
        return ()


def _index(folder: Path) -> Mapping[str, Any]:
    index = Listing(folder, {}, lambda name: (folder / name).read_bytes()).json(INDEX_NAME)
    if not isinstance(index.get("weight_map"), dict):
        raise KconvertError(f"{folder / INDEX_NAME} has no weight_map; export the whole model again")
    return index


def _moves(
    destination: Path, root: Path, index: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of the patch, and the one in DST whose bytes it replaces."""
    files = {file for name in tensors if isinstance(file := index["weight_map"].get(name), str)}
    with Reader(destination) as reader:
        there = {tensor.name: tensor for file in sorted(files) for tensor in _shard(destination, file, reader)}
    for name, tensor in tensors.items():
        old = there.get(name)
        if old is None:
            raise KconvertError(
                f"{root / tensor.file} has tensor {name!r}, which {destination} has not; export all of the model"
            )
        if (old.dtype, old.shape) != (tensor.dtype, tensor.shape):
            raise KconvertError(
                f"{root / tensor.file}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, but {old.dtype} "
                f"{list(old.shape)} in {destination}; export the whole model"
            )
        yield tensor, old


def _shard(destination: Path, file: str, reader: Reader) -> Iterable[Tensor]:
    """Its tensors; KconvertError where it is no file of DST's own."""
    path = destination / file
    if Path(file).name != file or not path.is_file():
        raise KconvertError(f"{path} is missing; export the whole model again")
    if path.is_symlink() or path.stat().st_nlink > 1:
        raise KconvertError(f"{path} is linked from elsewhere, where it would change as well; put a copy in its place")
    return read_header(str(path), path.stat().st_size, partial(reader.read, file), file)


def _write(destination: Path, reader: Reader, moves: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The patch's bytes in their places, and on the disk."""
    opened: dict[str, int] = {}
    try:
        for _, old in moves:
            if old.file not in opened:
                opened[old.file] = os.open(destination / old.file, os.O_WRONLY | os.O_CLOEXEC)

        def move(pair: tuple[Tensor, Tensor]) -> None:
            new, old = pair
            for done in range(0, new.nbytes, PIECE):
                data = reader.read(new.file, new.start + done, min(PIECE, new.nbytes - done))
                write_at(opened[old.file], memoryview(data), old.start + done)

        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(move, moves):
                pass
            for _ in pool.map(os.fsync, opened.values()):
                pass
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
