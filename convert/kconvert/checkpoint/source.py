"""A checkpoint: its configuration, every tensor by name, and reads of any byte range; from a directory of the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kconvert.checkpoint.directory import check_same, list_directory, snapshot
from kconvert.checkpoint.files import PAGE, is_directory, open_direct, read_at
from kconvert.checkpoint.index import choose_files, compare_index, is_one_set, read_weight_map
from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, STATE_DIR, FileStat, Listing
from kconvert.checkpoint.lookalikes import check_no_adapter
from kconvert.checkpoint.safetensors import Tensor, read_header
from kconvert.checkpoint.side_files import why_left_out
from kconvert.errors import KconvertError, explain_os_error

KEPT_OPEN = 256  # descriptors; a process may have 1024


@dataclass(frozen=True)
class Checkpoint:
    """Everything about a checkpoint but its weights' values.

    `tensors` are in file order, `files` are the safetensors files, `side_files` everything that a converted copy takes
    along (paths relative to `root`), `left_out` what it does not; `side_files.why_left_out` says why.
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
    def title(self) -> Path:
        """What messages about the whole begin with."""
        return self.root

    @property
    def untouched(self) -> Path:
        """Where nothing may be written while it is read."""
        return self.root

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

    @property
    def commit(self) -> str | None:
        """The revision by which anybody reads the same on the Hub; None where nothing but the address says what is read."""
        return None

    def reader(self) -> Reader:
        return Reader(self.root)

    def side_file(self, name: str) -> Path:
        """Where the side file `name` can be read."""
        return self.root / name

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, listed above or not."""
        return (self.root / name).is_file()

    def check_same(self, files: Iterable[str]) -> None:
        """KconvertError for the first of these files that has changed since the checkpoint was opened."""
        for file in files:
            check_same(self.root, file, self.files[file])

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


def open_directory(
    path: str | os.PathLike[str],
    revision: str | None = None,
    enough: Callable[[Iterable[Tensor]], bool] | None = None,
) -> Checkpoint:
    """Read configuration, index and headers of the checkpoint in directory `path`.

    A repository of the Hub's cache (`models--org--name`) will do, too: its snapshot of `revision`, by default of main. With
    `enough` files are read until it is true of one's tensors, and these are the checkpoint's.
    Raises KconvertError for anything unsound: a missing or damaged file, an index that disagrees with the headers, a link
    that leads outside the directory (see `links_allowed`), and for a directory that holds something else than a model.
    """
    if not is_directory(path):
        if os.fspath(path).lower().endswith(".gguf") and not os.path.lexists(path):
            raise KconvertError(
                f"there is no file {os.fspath(path)}; give a model in GGUF, its first part or its directory"
            )
        raise KconvertError(
            f"{os.fspath(path) or repr('')} is not a directory; give the directory that holds the checkpoint's config.json"
        )
    try:
        root = snapshot(Path(os.path.abspath(path)), revision)
        listing = Listing(root, list_directory(root), lambda file: (root / file).read_bytes())
        with Reader(root) as reader:

            def headers(files: list[str]) -> Iterator[list[Tensor]]:
                for file in files:
                    found = read_header(str(root / file), listing.files[file].nbytes, partial(reader.read, file), file)
                    yield found
                    if enough is not None and enough(found):
                        return

            return assemble(listing, headers, spare_index=enough is not None)
    except OSError as error:
        raise explain_os_error(error, f"cannot read {error.filename or path}") from None


def assemble(
    listing: Listing, headers: Callable[[list[str]], Iterable[list[Tensor]]], spare_index: bool = False
) -> Checkpoint:
    """A checkpoint from the list of its files; `headers` reads those of safetensors files.

    With `spare_index` the index is not read where the files' names leave no doubt which of them make up the checkpoint.
    """
    root, shards, weight_map = listing.root, listing.safetensors, None
    if INDEX_NAME not in listing.files:
        shards = choose_files(listing)
    elif not (spare_index and is_one_set(shards)):
        weight_map = read_weight_map(listing)
        shards = sorted(set(weight_map.values()))
    _check_fetched(listing, shards)
    tensors: dict[str, Tensor] = {}
    for found in headers(shards):
        _add_tensors(root, found, tensors)
    check_no_adapter(listing, tensors)
    if weight_map is not None:
        compare_index(listing, tensors, weight_map)
    known = {*shards, INDEX_NAME, CONFIG_NAME, STATE_DIR}
    others = {file: stat for file, stat in listing.files.items() if file not in known}
    return Checkpoint(
        root=root,
        config=listing.json(CONFIG_NAME) if CONFIG_NAME in listing.files else {},
        tensors=tensors,
        files={file: listing.files[file] for file in shards},
        side_files={file: stat.nbytes for file, stat in others.items() if why_left_out(file) is None},
        left_out=tuple(file for file in others if why_left_out(file) is not None),
    )


def _check_fetched(listing: Listing, shards: Iterable[str]) -> None:
    """A file that aria2 is still filling has its full size from the beginning."""
    for file in shards:
        if f"{file}.aria2" in listing.files:
            raise KconvertError(f"{listing.root / file} is not all there, {file}.aria2 says; let its download finish")


def _add_tensors(root: Path, found: Iterable[Tensor], tensors: dict[str, Tensor]) -> None:
    for tensor in found:
        if (other := tensors.setdefault(tensor.name, tensor)) is not tensor:
            raise KconvertError(
                f"{root / tensor.file}: tensor {tensor.name!r} is here and in {other.file}; they are not files of one "
                "checkpoint, put those that are into a directory of their own"
            )
