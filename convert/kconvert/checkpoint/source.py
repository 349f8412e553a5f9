"""A checkpoint: its configuration, every tensor by name, and reads of any byte range; from a directory of the disk."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kconvert.checkpoint.header import Entry, read_header
from kconvert.errors import KconvertError, explain_os_error
from kconvert.files import PAGE, open_direct, read_at

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
STATE_DIR = ".kconvert"
KEPT_OPEN = 256  # descriptors; a process may have 1024
NUMBERED = re.compile(r"(.*?)([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")
# Weights in other containers: not tensors of this checkpoint, and stale beside a converted one.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True, slots=True)
class Tensor:
    """An entry of a safetensors file; `start` counts bytes from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size in bytes, and a stamp that changes when the content does."""

    nbytes: int
    stamp: str


@dataclass(frozen=True)
class Checkpoint:
    """Everything about a checkpoint but its weights' values.

    `tensors` are in file order, `files` are the safetensors files, `side_files` everything that a converted copy takes
    along (paths relative to `root`), `left_out` what it does not (weights in files that the checkpoint does not name).
    """

    root: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, FileStat]
    side_files: Mapping[str, int]
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        """`org/name@revision` of a Hub cache snapshot, the directory's name otherwise."""
        if self.root.parent.name == "snapshots" and self.root.parents[1].name.startswith("models--"):
            repo = self.root.parents[1].name.removeprefix("models--").replace("--", "/")
            return f"{repo}@{self.root.name}"
        return self.root.name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def directory(self) -> Path | None:
        """Where its files lie; None for a checkpoint on the Hub."""
        return self.root

    @property
    def origin(self) -> dict[str, str | None]:
        """Where on the Hub it comes from: `origin` is the commit, `asked` the revision by which it was named."""
        return {}

    def reader(self) -> Reader:
        return Reader(self.root)

    def side_file(self, name: str) -> Path:
        """Where the side file `name` can be read."""
        return self.root / name

    def check_index(self) -> None:
        """KconvertError when the index disagrees with the headers; whoever opened a directory has looked already."""


class Reader:
    """Positional reads of a checkpoint's files from any thread; files are opened once and closed together.

    Of more files than KEPT_OPEN the others are opened for every read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cached: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        self._lock = threading.Lock()

    def path(self, file: str) -> Path:
        return self._root / file

    def read(self, file: str, start: int, nbytes: int) -> bytes:
        """Some bytes of `file`, by way of the page cache: for what is small or read again."""
        buffer = memoryview(bytearray(nbytes))
        self._fill(file, self._cached, start, buffer, nbytes)
        return bytes(buffer)

    def fetch(self, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        """Bulk bytes of `file`, past the page cache where the filesystem can: a view of `nbytes` bytes in `room`.

        `room` begins on a page and has 2 * PAGE bytes more than wanted, because such reads are whole pages. The view's
        address is equal to `start` modulo PAGE.
        """
        skip = start % PAGE
        whole = -(-(skip + nbytes) // PAGE) * PAGE
        self._fill(file, self._direct, start - skip, room[:whole], skip + nbytes)
        return room[skip : skip + nbytes]

    def _fill(self, file: str, descriptors: dict[str, int], start: int, buffer: memoryview, needed: int) -> None:
        try:
            with self._open(file, descriptors) as descriptor:
                done = read_at(descriptor, buffer, start, needed)
        except OSError as error:
            raise explain_os_error(error, f"cannot read {self.path(file)}") from None
        if done < needed:
            raise KconvertError(
                f"{self.path(file)} ends at byte {start + done}, inside a tensor; it shrank while it was being read, "
                "restore it and run the same command again"
            )

    @contextmanager
    def _open(self, file: str, descriptors: dict[str, int]) -> Iterator[int]:
        with self._lock:
            descriptor = descriptors.get(file)
            if descriptor is None:
                opener = open_direct if descriptors is self._direct else os.open
                descriptor = opener(self.path(file), os.O_RDONLY)
                if len(descriptors) < KEPT_OPEN:
                    descriptors[file] = descriptor
            kept = descriptors.get(file) == descriptor
        try:
            yield descriptor
        finally:
            if not kept:
                os.close(descriptor)

    def forget(self, file: str) -> None:
        """Close `file`, which nobody reads any more."""
        with self._lock:
            for descriptors in (self._cached, self._direct):
                if file in descriptors:
                    os.close(descriptors.pop(file))

    def close(self) -> None:
        for descriptors in (self._cached, self._direct):
            while descriptors:
                os.close(descriptors.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_directory(path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Read configuration, index and headers of the checkpoint in directory `path`.

    A repository of the Hub's cache (`models--org--name`) will do, too: its snapshot of `revision`, by default of main.
    Raises KconvertError for anything unsound: a missing or damaged file, an index that disagrees with the headers, a path
    that leads outside the directory.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        raise KconvertError(f"{path} is not a directory; give the directory that holds the checkpoint's config.json")
    try:
        root = _snapshot(root, revision)
        inventory = _inventory(root)
        with Reader(root) as reader:

            def headers(files: list[str]) -> Iterator[list[Entry]]:
                for file in files:
                    yield read_header(str(root / file), inventory[file].nbytes, partial(reader.read, file))

            return assemble(root, inventory, lambda file: (root / file).read_bytes(), headers)
    except OSError as error:
        raise explain_os_error(error, f"cannot read {root}") from None


def assemble(
    root: Path,
    inventory: Mapping[str, FileStat],
    load: Callable[[str], bytes],
    headers: Callable[[list[str]], Iterable[list[Entry]]],
    spare_index: bool = False,
) -> Checkpoint:
    """A checkpoint from the list of its files; `load` reads a small one whole, `headers` those of safetensors files.

    With `spare_index` the index is not read where the files' names leave no doubt which of them make up the checkpoint.
    """
    shards = sorted(file for file in inventory if file.endswith(".safetensors"))
    weight_map = None
    if INDEX_NAME not in inventory:
        _check_lone(root, shards)
    elif not (spare_index and _is_one_set(shards)):
        weight_map = read_weight_map(root, inventory, load)
        shards = sorted(set(weight_map.values()))
    tensors: dict[str, Tensor] = {}
    for file, entries in zip(shards, headers(shards), strict=True):
        _add_tensors(root, file, entries, tensors)
    if weight_map is not None:
        compare_index(root, tensors, weight_map)
    known = {*shards, INDEX_NAME, CONFIG_NAME, STATE_DIR}
    others = {file: stat for file, stat in inventory.items() if file not in known}
    return Checkpoint(
        root=root,
        config=_parse_json(root / CONFIG_NAME, load(CONFIG_NAME)) if CONFIG_NAME in inventory else {},
        tensors=tensors,
        files={file: inventory[file] for file in shards},
        side_files={file: stat.nbytes for file, stat in others.items() if not file.endswith(OTHER_WEIGHTS)},
        left_out=tuple(file for file in others if file.endswith(OTHER_WEIGHTS)),
    )


def _snapshot(root: Path, revision: str | None) -> Path:
    """`root` itself, or the snapshot of `revision` (a branch, a tag or a commit) if it is a repository of the Hub's cache."""
    if not (root / "snapshots").is_dir():
        if revision is not None:
            raise KconvertError(
                f"{root} has no revisions, it is no repository of the Hub's cache; leave out --revision"
            )
        return root
    name = revision or "main"
    inside = not os.path.isabs(name) and ".." not in Path(name).parts
    reference = root / "refs" / name
    snapshot = root / "snapshots" / (reference.read_text("utf-8").strip() if reference.is_file() else name)
    if not inside or not snapshot.is_dir():
        raise KconvertError(f"{root} has no snapshot of the revision {name!r}; fetch it")
    return snapshot


def _inventory(root: Path) -> dict[str, FileStat]:
    """Every regular file below `root`, by relative path; hidden directories (.git, .cache, our own) are not content."""
    homes = [root.resolve()]
    if root.parent.name == "snapshots":
        homes.append(root.parents[1].resolve() / "blobs")
    found: dict[str, FileStat] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in [*sorted(files), *folders]):
            if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
                raise KconvertError(
                    f"{path} is a symbolic link to {path.resolve()}, outside the checkpoint; put the file itself there"
                )
            if path.is_file():
                stat = path.stat()
                found[str(path.relative_to(root))] = FileStat(stat.st_size, f"{stat.st_size}:{stat.st_mtime_ns}")
    return found


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KconvertError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(table, dict):
        raise KconvertError(f"{path} is not a JSON object; fetch it again")
    return table


def read_weight_map(root: Path, inventory: Mapping[str, FileStat], load: Callable[[str], bytes]) -> dict[str, str]:
    """Which tensor is in which file, as the index says; every such file is in the inventory."""
    path = root / INDEX_NAME
    weight_map = _parse_json(path, load(INDEX_NAME)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KconvertError(f"{path} has no weight_map; fetch it again")
    checked: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in checked:
            continue
        if not isinstance(file, str) or os.path.isabs(file) or ".." in Path(file).parts or "\0" in file:
            raise KconvertError(
                f"{path}: tensor {name!r} is said to be in {file!r}, outside the checkpoint; mend the index"
            )
        if file not in inventory:
            raise KconvertError(f"{root / file} is missing; the index says that it holds tensor {name!r}, fetch it")
        checked.add(file)
    return weight_map


def compare_index(root: Path, tensors: Mapping[str, Tensor], weight_map: Mapping[str, str]) -> None:
    """KconvertError unless the index places every tensor where it is."""
    for tensor in tensors.values():
        said = weight_map.get(tensor.name)
        if said != tensor.file:
            fault = f"{INDEX_NAME} places it in {said}" if said else f"{INDEX_NAME} does not name it"
            raise KconvertError(f"{root / tensor.file}: tensor {tensor.name!r} is here but {fault}; mend the index")
    if len(weight_map) != len(tensors):
        missing = next(name for name in weight_map if name not in tensors)
        raise KconvertError(
            f"{root / weight_map[missing]}: tensor {missing!r} is in {INDEX_NAME} but not in the file; fetch both again"
        )


def _check_lone(root: Path, shards: list[str]) -> None:
    """Without an index there must be one file."""
    if not shards:
        raise KconvertError(f"{root} holds no safetensors files; give the directory of a safetensors checkpoint")
    if len(shards) > 1:
        raise KconvertError(f"{root} holds {len(shards)} safetensors files but no {INDEX_NAME}; fetch it")


def _is_one_set(shards: list[str]) -> bool:
    """Whether these are model-1-of-N to model-N-of-N, all of them and nothing else; what is in which is not in a name."""
    names = [match for match in map(NUMBERED.fullmatch, shards) if match is not None]
    numbers = sorted(int(name[2]) for name in names)
    kinds = {(name[1], int(name[3])) for name in names}
    return len(kinds) == 1 and kinds.pop()[1] == len(shards) and numbers == list(range(1, len(shards) + 1))


def _add_tensors(root: Path, file: str, entries: Iterable[Entry], tensors: dict[str, Tensor]) -> None:
    for entry in entries:
        if entry.name in tensors:
            other = tensors[entry.name].file
            raise KconvertError(f"{root / file}: tensor {entry.name!r} is here and in {other}; fetch both again")
        tensors[entry.name] = Tensor(entry.name, entry.dtype, entry.shape, file, entry.start, entry.nbytes)
