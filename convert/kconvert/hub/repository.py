"""A checkpoint on the Hub, without downloading it: the list of files, and the headers by HTTP ranges.

The commit is pinned by the first call; all others name it, so a branch that moves meanwhile changes nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile, RepoFolder

from kconvert.checkpoint.listing import FileStat, Listing
from kconvert.checkpoint.remote import RemoteCheckpoint, Sink, assemble_remote, check_file_name
from kconvert.errors import KconvertError
from kconvert.hub.client import FIRST, api, into_cache, patiently, transfer
from kconvert.hub.digests import ContentDigest, matches
from kconvert.hub.ids import HubId

SMALL_FILE_ATTEMPTS = 3


@dataclass(frozen=True)
class HubCheckpoint(RemoteCheckpoint):
    """A checkpoint on the Hub at the commit `place.revision`; `asked` is the revision that was asked for.

    `root` is `org/name@commit`. What is fetched whole goes into the Hub's cache.
    """

    place: HubId
    asked: str | None

    @property
    def name(self) -> str:
        return str(self.place)

    @property
    def origin(self) -> dict[str, str | None]:
        return {"origin": self.name, "asked": self.asked}

    @property
    def commit(self) -> str | None:
        return self.place.revision

    def side_file(self, name: str) -> Path:
        return small_file(self.place, name, self.listed[name])

    def transfer(self, file: str, start: int, stop: int, sink: Sink, stopped: threading.Event | None = None, /) -> None:
        transfer(self.place, file, start, stop, sink, stopped)

    def digest(self, file: str) -> ContentDigest:
        return ContentDigest(self.listed[file])

    def cached(self, file: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(self.place.repo, file, revision=self.place.revision)
        return Path(found) if isinstance(found, str) else None

    def cache(self, file: str) -> Path:
        folder = repo_folder_name(repo_id=self.place.repo, repo_type="model")
        return Path(constants.HF_HUB_CACHE, folder, "blobs", self.listed[file].stamp.partition(":")[2])

    def keep(self, file: str) -> Path:
        return into_cache(self.place, file)  # which finds the content there, and links it


def open_repository(asked: HubId, revision: str | None = None) -> HubCheckpoint:
    """The checkpoint in a repository; `revision` goes before the one of the id. Raises KconvertError, see kconvert.address."""
    asked = HubId(asked.repo, revision or asked.revision)
    info = patiently(asked, FIRST, lambda: api().model_info(asked.repo, revision=asked.revision))
    if not info.sha:
        raise KconvertError(f"{asked} has no commits yet; name a repository with a checkpoint in it")
    place = HubId(asked.repo, info.sha)
    inventory = list_files(place)

    def load(file: str) -> bytes:
        return small_file(place, file, inventory[file]).read_bytes()

    listing = Listing(Path(str(place)), inventory, load)
    found = assemble_remote(listing, partial(transfer, place))
    return HubCheckpoint(**vars(found), place=place, asked=asked.revision, listed=inventory)


def list_files(place: HubId) -> dict[str, FileStat]:
    """Every file of a commit, by path, stamped with its digest; hidden directories are not content."""

    def look() -> list[RepoFile | RepoFolder]:
        return list(api().list_repo_tree(place.repo, recursive=True, revision=place.revision))

    tree = patiently(place, "list the files", look)
    found: dict[str, FileStat] = {}
    for entry in tree:
        if isinstance(entry, RepoFile):
            check_file_name(place, entry.path)
            if not any(folder.startswith(".") for folder in PurePosixPath(entry.path).parts[:-1]):
                stamp = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
                found[entry.path] = FileStat(entry.size, stamp)
    return found


def small_file(place: HubId, name: str, stat: FileStat) -> Path:
    """A file that is needed whole, in the Hub's cache; checked against its digest."""
    for attempt in range(SMALL_FILE_ATTEMPTS):
        path = into_cache(place, name, force=attempt > 0)
        if matches(path, stat):
            return path
    raise KconvertError(
        f"{name} of {place} does not arrive as the Hub's list describes it; run the same command again later"
    )
