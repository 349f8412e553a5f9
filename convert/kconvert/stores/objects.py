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

from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, STATE_DIR, FileStat, Listing
from kconvert.checkpoint.remote import Memory, RemoteCheckpoint, Sink, assemble_remote, check_file_name
from kconvert.errors import KconvertError, explain_os_error
from kconvert.stores.client import is_forked, open_store, persist, transfer
from kconvert.stores.forked import Wanted, read
from kconvert.stores.urls import StoreUrl, cache_directory

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

ETAG = "etag:"


class Unchecked:
    """The content that a range request names by its ETag has no digest that anybody could compute."""

    def update(self, data: bytes | memoryview, /) -> None:
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
        path = cache_directory() / folder / name
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                partly = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
                partly.write_bytes(_whole(self.transfer, name, self.listed[name]))
                partly.rename(path)
        except OSError as error:
            raise explain_os_error(error, f"cannot write {path}") from None
        return path

    def transfer(self, file: str, start: int, stop: int, sink: Sink, stopped: threading.Event | None = None, /) -> None:
        _transfer(self.place, self.store, self.listed[file], file, start, stop, sink, stopped)

    def digest(self, file: str) -> Unchecked:
        return Unchecked()


def open_objects(place: StoreUrl, revision: str | None = None) -> StoreCheckpoint:
    """The checkpoint below a prefix. Raises KconvertError, see kconvert.address."""
    if revision is not None:
        raise KconvertError(f"{place} is in an object store, which has no revisions; leave out --revision")
    store = open_store(place)
    objects = list_objects(place, store)
    inventory = {name: stat for name, stat in objects.items() if not is_hidden(name)}
    if not objects:
        raise KconvertError(f"{place} has no objects; give the prefix that the checkpoint's config.json is below")
    missing = [name for name in (CONFIG_NAME, INDEX_NAME) if name not in inventory]
    if missing and any(name.startswith(f"{STATE_DIR}/") for name in objects):
        raise KconvertError(f"{place} is unfinished, it has no {missing[0]}; run the conversion again")

    def move(file: str, *range_and_sink: Any) -> None:
        _transfer(place, store, inventory[file], file, *range_and_sink)

    listing = Listing(Path(place.path), inventory, lambda file: _whole(move, file, inventory[file]))
    found = assemble_remote(listing, move)
    return StoreCheckpoint(**vars(found), place=place, store=store, listed=inventory)


def list_objects(place: StoreUrl, store: ObjectStore) -> dict[str, FileStat]:
    """Every object below the prefix by its path, those of hidden folders too; what a console makes of a folder is none."""
    import obstore

    found = {}
    for entry in persist(place, "list its objects", lambda: obstore.list(store).collect()):
        name = str(entry["path"])
        if name and not (entry["size"] == 0 and name.endswith("/")):
            check_file_name(place, name)
            found[name] = stat_of(entry)
    return found


def stat_of(entry: ObjectMeta) -> FileStat:
    """An object's size, stamped with its ETag."""
    tag = entry["e_tag"]
    return FileStat(entry["size"], f"{ETAG}{tag}" if tag else f"time:{entry['last_modified'].timestamp()}")


def is_hidden(name: str) -> bool:
    """Whether an object is not content but in some program's folder."""
    return any(folder.startswith(".") for folder in PurePosixPath(name).parts[:-1])


def _transfer(
    place: StoreUrl,
    store: ObjectStore,
    stat: FileStat,
    file: str,
    start: int,
    stop: int,
    sink: Sink,
    stopped: threading.Event | None = None,
) -> None:
    tag = stat.stamp.removeprefix(ETAG) if stat.stamp.startswith(ETAG) else None
    if is_forked():
        read(Wanted(place, tag, file, start, stop), sink)
    else:
        transfer(place, store, tag, file, start, stop, sink, stopped)


def _whole(move: Callable[..., None], file: str, stat: FileStat) -> bytes:
    content = bytearray(stat.nbytes)
    move(file, 0, stat.nbytes, Memory(content))
    return bytes(content)
