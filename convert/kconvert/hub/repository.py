"""A checkpoint on the Hub, without downloading it: the list of files, and the headers by HTTP ranges.

The commit is pinned by the first call; all others name it, so a branch that moves meanwhile changes nothing. The headers
say all that the index does, and a large model's has 20 MB: it is only read where it must decide which files belong to the
checkpoint, and before weights are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub.hf_api import RepoFile, RepoFolder

from kconvert.checkpoint.index import compare_index, read_weight_map
from kconvert.checkpoint.listing import INDEX_NAME, FileStat, Listing
from kconvert.checkpoint.safetensors import Tensor, read_header
from kconvert.checkpoint.source import Checkpoint, Reader, assemble
from kconvert.errors import KconvertError
from kconvert.hub.client import api, into_cache, patiently, transfer
from kconvert.hub.digests import matches
from kconvert.hub.ids import HubId

CONNECTIONS = 16  # at a time, for headers: each takes longer to answer than to arrive
FIRST_READ = (1 << 16, 1 << 21)  # at least and at most, of a header of unknown length
HEADER_TO_INDEX = 1.4  # bytes: a header says of a tensor dtype, shape and offsets, the index its file
SMALL_FILE_ATTEMPTS = 3


@dataclass(frozen=True)
class HubCheckpoint(Checkpoint):
    """A checkpoint on the Hub at the commit `place.revision`; `asked` is the revision that was asked for.

    `listed` are all its files as the Hub lists them.
    `root` is no directory but names it in messages: `org/name@commit`. Reads go over the network.
    """

    place: HubId
    asked: str | None
    listed: Mapping[str, FileStat]

    @property
    def name(self) -> str:
        return str(self.place)

    @property
    def directory(self) -> None:
        return None

    @property
    def origin(self) -> dict[str, str | None]:
        return {"origin": self.name, "asked": self.asked}

    def reader(self) -> Reader:
        return RangeReader(self.place)

    def side_file(self, name: str) -> Path:
        return small_file(self.place, name, self.listed[name])

    def has(self, name: str) -> bool:
        return name in self.listed

    def check_index(self) -> None:
        if self.has(INDEX_NAME):
            listing = Listing(self.root, self.listed, lambda name: self.side_file(name).read_bytes())
            compare_index(listing, self.tensors, read_weight_map(listing))


class RangeReader(Reader):
    """Reads of any byte range of a repository's files, each a request."""

    def __init__(self, place: HubId) -> None:
        super().__init__(Path(str(place)))
        self._place = place

    def _fill(self, file: str, descriptors: dict[str, int], start: int, buffer: memoryview, needed: int) -> None:
        done = 0

        def take(chunk: bytes) -> None:
            nonlocal done
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)

        transfer(self._place, file, start, start + needed, take)


def open_repository(asked: HubId, revision: str | None = None) -> HubCheckpoint:
    """The checkpoint in a repository; `revision` goes before the one of the id. Raises KconvertError, see kconvert.address."""
    asked = HubId(asked.repo, revision or asked.revision)
    info = patiently(asked, "find the commit", lambda: api().model_info(asked.repo, revision=asked.revision))
    if not info.sha:
        raise KconvertError(f"{asked} has no commits yet; name a repository with a checkpoint in it")
    place = HubId(asked.repo, info.sha)
    inventory = list_files(place)

    def headers(files: list[str]) -> Iterable[list[Tensor]]:
        guess = _header_bytes(inventory, len(files))
        return pool.map(lambda file: _header(place, file, inventory[file].nbytes, guess), files)

    def load(file: str) -> bytes:
        return small_file(place, file, inventory[file]).read_bytes()

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = assemble(Listing(Path(str(place)), inventory, load), headers, spare_index=True)
    return HubCheckpoint(**vars(found), place=place, asked=asked.revision, listed=inventory)


def list_files(place: HubId) -> dict[str, FileStat]:
    """Every file of a commit, by path, stamped with its digest; hidden directories are not content."""

    def look() -> list[RepoFile | RepoFolder]:
        return list(api().list_repo_tree(place.repo, recursive=True, revision=place.revision))

    tree = patiently(place, "list the files", look)
    found: dict[str, FileStat] = {}
    for entry in tree:
        if isinstance(entry, RepoFile):
            _check_name(place, entry.path)
            if not any(folder.startswith(".") for folder in PurePosixPath(entry.path).parts[:-1]):
                stamp = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
                found[entry.path] = FileStat(entry.size, stamp)
    return found


def _check_name(place: HubId, name: str) -> None:
    """Names come from whoever made the repository; they become paths below directories of ours."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise KconvertError(
            f"{place} has a file called {name!r}, which could lead anywhere; do not trust this repository"
        )


def small_file(place: HubId, name: str, stat: FileStat) -> Path:
    """A file that is needed whole, in the Hub's cache; checked against its digest."""
    for attempt in range(SMALL_FILE_ATTEMPTS):
        path = into_cache(place, name, force=attempt > 0)
        if matches(path, stat):
            return path
    raise KconvertError(
        f"{name} of {place} does not arrive as the Hub's list describes it; run the same command again later"
    )


def _header_bytes(inventory: Mapping[str, FileStat], shards: int) -> int:
    """What a header should not exceed, by the size of the index; a longer one takes a second request."""
    index = inventory[INDEX_NAME].nbytes if INDEX_NAME in inventory else 0
    least, most = FIRST_READ
    return min(most, max(least, int(index / shards * HEADER_TO_INDEX)))


def _header(place: HubId, file: str, size: int, guess: int) -> list[Tensor]:
    head = bytearray()

    def read(start: int, nbytes: int) -> bytes:
        stop = start + nbytes
        if stop > len(head):
            transfer(place, file, len(head), min(size, max(stop, guess)), head.extend)
        return bytes(head[start:stop])

    return read_header(f"{place}/{file}", size, read, file)
