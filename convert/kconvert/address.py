"""A checkpoint by its address: a directory of the disk, a repository of the Hub, objects of a store, or a GGUF file."""

from __future__ import annotations

import os

from kconvert.checkpoint.gguf_files import is_gguf, open_gguf
from kconvert.checkpoint.source import Checkpoint, open_directory
from kconvert.errors import KconvertError
from kconvert.hub.ids import check_address, parse_hub_id
from kconvert.stores.urls import parse_store_url


def open_checkpoint(path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Read configuration, index and headers of the checkpoint in directory `path`, see open_directory.

    A Hub id (`org/name`, `hf://org/name@revision`) will do where no such directory is: its headers come by HTTP; those of
    `s3://bucket/prefix`, `gs://…` and `az://…` from the store.
    Raises KconvertError for anything unsound: a missing or damaged file, an index that disagrees with the headers, a link
    that leads outside the directory.
    """
    path = address(path)
    if (objects := parse_store_url(path)) is not None:
        from kconvert.stores.objects import open_objects

        return open_objects(objects, revision)
    place = parse_hub_id(path)
    if place is None or os.path.lexists(path):
        return open_directory(path, revision)
    check_address()
    from kconvert.hub.repository import open_repository

    return open_repository(place, revision)


def address(path: object) -> str:
    """KconvertError for what is none, as somebody else's variable may be."""
    found = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(found, str):
        raise KconvertError(f"{path!r} is no path; give a str or a pathlib.Path")
    return found


def anywhere(path: str | os.PathLike[str]) -> str:
    """The same address, from whatever directory it is looked at."""
    return os.path.abspath(path) if os.path.lexists(path) else os.fspath(path)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether an address that is no directory could be one of the Hub or of an object store."""
    return parse_store_url(os.fspath(path)) is not None or parse_hub_id(os.fspath(path)) is not None


def open_stored(path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The same, or a model in GGUF, whose tensors are taken as they lie in its files and not for weights."""
    return open_gguf(path) if is_gguf(path) else open_checkpoint(path, revision)
