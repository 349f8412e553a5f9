"""A checkpoint in an object store, without downloading it: the list of objects, the rest by ranges of bytes.

Every request names the ETag that the list had, so that an object which is replaced meanwhile is noticed and never mixed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.listing import FileStat, Listing
from kconvert.checkpoint.remote import RemoteCheckpoint, assemble_remote, check_file_name
from kconvert.errors import KconvertError, explain_os_error
from kconvert.stores.client import attempt, open_store, transfer
from kconvert.stores.urls import StoreUrl

if TYPE_CHECKING:
    from obstore.store import ObjectStore

ETAG = "etag:"


class Unchecked:
    """The content that a range request names by its ETag has no digest that anybody could compute."""

    def update(self, data: bytes, /) -> None:
        """Nothing comes of it."""

    def agrees(self) -> bool:
        return True


@dataclass(frozen=True)
class StoreCheckpoint(RemoteCheckpoint):
    """A checkpoint below `place`; `root` is its bucket and prefix."""

    place: StoreUrl
    store: ObjectStore

    @property
    def name(self) -> str:
        return str(self.place)

    def side_file(self, name: str) -> Path:
        """In a cache of this machine: another content has another place there."""
        stamp = self.listed[name].stamp
        folder = hashlib.sha256(f"{self.place} {stamp}".encode()).hexdigest()[:32]
        path = _cache() / folder / name
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                partly = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
                partly.write_bytes(_whole(self.transfer, name, self.listed[name]))
                partly.rename(path)
        except OSError as error:
            raise explain_os_error(error, f"cannot write {path}") from None
        return path

    def transfer(
        self, file: str, start: int, stop: int, take: Callable[[bytes], Any], stopped: threading.Event | None = None, /
    ) -> None:
        _transfer(self.place, self.store, self.listed[file], file, start, stop, take, stopped)

    def digest(self, file: str) -> Unchecked:
        return Unchecked()


def open_objects(place: StoreUrl, revision: str | None = None) -> StoreCheckpoint:
    """The checkpoint below a prefix. Raises KconvertError, see kconvert.address."""
    if revision is not None:
        raise KconvertError(f"{place} is in an object store, which has no revisions; leave out --revision")
    store = open_store(place)
    inventory = _list(place, store)
    if not inventory:
        raise KconvertError(f"{place} has no objects; give the prefix that the checkpoint's config.json is below")

    def move(file: str, *range_and_taker: Any) -> None:
        _transfer(place, store, inventory[file], file, *range_and_taker)

    listing = Listing(Path(place.path), inventory, lambda file: _whole(move, file, inventory[file]))
    found = assemble_remote(listing, move)
    return StoreCheckpoint(**vars(found), place=place, store=store, listed=inventory)


def _list(place: StoreUrl, store: ObjectStore) -> dict[str, FileStat]:
    """Every object below the prefix but those of hidden folders, by its path, stamped with its ETag."""
    import obstore

    found = {}
    for entry in attempt(place, "list its objects", lambda: obstore.list(store).collect()):
        name = str(entry["path"])
        check_file_name(place, name)
        if not any(folder.startswith(".") for folder in PurePosixPath(name).parts[:-1]):
            tag = entry["e_tag"]
            stamp = f"{ETAG}{tag}" if tag else f"time:{entry['last_modified'].timestamp()}"
            found[name] = FileStat(entry["size"], stamp)
    return found


def _transfer(place: StoreUrl, store: ObjectStore, stat: FileStat, *rest: Any) -> None:
    tag = stat.stamp.removeprefix(ETAG) if stat.stamp.startswith(ETAG) else None
    transfer(place, store, tag, *rest)


def _whole(move: Callable[..., None], file: str, stat: FileStat) -> bytes:
    content = bytearray()
    move(file, 0, stat.nbytes, content.extend)
    return bytes(content)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kconvert"
