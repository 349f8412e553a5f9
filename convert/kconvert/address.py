"""A checkpoint by its address: a directory of the disk, a repository of the Hub, or a GGUF file."""

from __future__ import annotations

import os

from kconvert.checkpoint.gguf_files import is_gguf, open_gguf
from kconvert.checkpoint.source import Checkpoint, open_directory
from kconvert.hub.ids import parse_hub_id


def open_checkpoint(path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Read configuration, index and headers of the checkpoint in directory `path`, see open_directory.

    A Hub id (`org/name`, `hf://org/name@revision`) will do where no such directory is: its headers come by HTTP.
    Raises KconvertError for anything unsound: a missing or damaged file, an index that disagrees with the headers, a link
    that leads outside the directory.
    """
    place = parse_hub_id(os.fspath(path))
    if place is None or os.path.lexists(path):
        return open_directory(path, revision)
    from kconvert.hub.repository import open_repository

    return open_repository(place, revision)


def open_stored(path: str | os.PathLike[str]) -> Checkpoint:
    """The same, or a model in GGUF, whose tensors are taken as they lie in its files and not for weights."""
    return open_gguf(path) if is_gguf(path) else open_checkpoint(path)
