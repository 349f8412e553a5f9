"""Where an output goes: into a directory, and from there perhaps to a repository of the Hub."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from kconvert.errors import KconvertError
from kconvert.hub.ids import HubId, parse_destination, parse_hub_id
from kconvert.stores.urls import parse_store_url


@dataclass(frozen=True)
class Delivery:
    """`push` is the repository that gets the output. With `passing` the directory is only on the way there."""

    directory: Path
    push: HubId | None = None
    passing: bool = False

    @classmethod
    def to(cls, destination: str | os.PathLike[str], push: str | None = None) -> Delivery:
        """From DST, a directory or a Hub id, and --push."""
        if (store := parse_store_url(os.fspath(destination))) is not None:
            raise KconvertError(f"an output cannot go to {store} yet; name a directory or a repository of the Hub")
        target = parse_destination(os.fspath(destination))
        if push is None and target is None:
            return cls(Path(destination))
        if push is not None and target is not None:
            raise KconvertError(f"DST is {target} and --push says {push}; leave out one of them")
        if push is not None and (target := parse_hub_id(push)) is None:
            raise KconvertError(f"--push {push} is no repository of the Hub; name it as ORG/NAME")
        assert target is not None
        if push is not None:
            return cls(Path(destination), target)
        from kconvert.hub.upload import workplace

        return cls(workplace(target), target, passing=True)

    def __str__(self) -> str:
        return str(self.push if self.passing else self.directory)

    def clear(self) -> None:
        """What has arrived need not be on the way any more."""
        if self.passing:
            shutil.rmtree(self.directory, ignore_errors=True)
