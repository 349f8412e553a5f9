"""Where an output goes: into a directory, and from there perhaps to a repository of the Hub or to an object store."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from kconvert.checkpoint.files import exists
from kconvert.errors import KconvertError
from kconvert.hub.ids import HubId, check_address, parse_destination, parse_hub_id
from kconvert.run.state.ranks import Rank
from kconvert.stores.urls import StoreUrl, cache_directory, parse_store_url

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/.*|(hf|s3|gs|az):.*")


@dataclass(frozen=True)
class Delivery:
    """`push` is the repository that gets the output, or `store` the place. With `passing` the directory is only on the way
    there."""

    directory: Path
    push: HubId | None = None
    passing: bool = False
    store: StoreUrl | None = None

    @classmethod
    def to(cls, destination: str | os.PathLike[str], push: str | None = None) -> Delivery:
        """From DST, a directory, a Hub id or a place in an object store, and --push."""
        if (store := parse_store_url(os.fspath(destination))) is not None:
            return cls._to_store(store, push)
        target = parse_destination(os.fspath(destination))
        if target is None:
            _check_directory(os.fspath(destination))
        if push is None and target is None:
            return cls(Path(destination))
        if push is not None and target is not None:
            raise KconvertError(f"DST is {target} and --push says {push}; leave out one of them")
        if push is not None and (target := parse_hub_id(push)) is None:
            raise KconvertError(f"--push {push} is no repository of the Hub; name it as ORG/NAME")
        assert target is not None
        check_address()
        if push is not None:
            return cls(Path(destination), target)
        from kconvert.hub.upload import workplace

        return cls(workplace(target), target, passing=True)

    @classmethod
    def _to_store(cls, store: StoreUrl, push: str | None) -> Delivery:
        if push is not None:
            raise KconvertError(f"DST is {store} and --push says {push}; leave out one of them")
        name = f"{store.bucket}-{hashlib.sha256(str(store).encode()).hexdigest()[:16]}"
        return cls(cache_directory() / "sending" / name, passing=True, store=store)

    def of(self, rank: Rank | None) -> Delivery:
        """Where a rank's share goes: on the way to a store each has a directory of its own, as if it were alone."""
        if rank is None or self.store is None:
            return self
        return replace(self, directory=self.directory.with_name(f"{self.directory.name}-{rank.index}-of-{rank.count}"))

    @property
    def leads_on(self) -> bool:
        """Whether shards go on from the directory."""
        return self.push is not None or self.store is not None

    def __str__(self) -> str:
        return str((self.push or self.store) if self.passing else self.directory)

    def clear(self) -> None:
        """What has arrived need not be on the way any more."""
        if self.passing:
            shutil.rmtree(self.directory, ignore_errors=True)


def _check_directory(destination: str) -> None:
    """KconvertError for what was hardly meant to be made as a directory."""
    if ADDRESS.fullmatch(destination) and not exists(destination):
        raise KconvertError(
            f"DST {destination} is no address that kconvert writes to, which are hf://ORG/NAME, s3://BUCKET/PREFIX, gs://… and "
            f"az://…; for a directory of that name give ./{destination}"
        )
