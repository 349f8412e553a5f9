"""Objects that are written: whole or not at all, and some of them only where there are none yet.

A store has no rename and needs none: an object is there once the last request for it is answered, and never in part. A large
one is sent in parts, of which nothing is to be seen before the last one; what a process that was killed has sent of them
stays hidden until a lifecycle rule of the bucket removes it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kconvert.checkpoint.listing import FileStat
from kconvert.errors import KconvertError, explain_os_error
from kconvert.stores.client import open_store, persist
from kconvert.stores.objects import list_objects, stat_of
from kconvert.stores.urls import StoreUrl

PART = 8 << 20  # bytes, a minute for each on a slow line; S3 takes no smaller ones than 5 MiB
MOST_PARTS = 9_000  # S3 takes 10,000
CONNECTIONS = 8  # at a time, for the parts of one object


class Objects:
    """Those below `place`, by their paths there. KconvertError when the store fails for longer than a few minutes."""

    def __init__(self, place: StoreUrl) -> None:
        self.place = place
        self._store = open_store(place)

    def listed(self) -> dict[str, FileStat]:
        """All of them, hidden ones too."""
        return list_objects(self.place, self._store)

    def read(self, name: str, nbytes: int | None = None) -> bytes | None:
        """The content of a small one, or the first bytes of any; None where there is none."""
        from obstore import get

        if nbytes == 0:
            return b""

        def look() -> bytes | None:
            try:
                return bytes(get(self._store, name, options={"range": (0, nbytes)} if nbytes else None).bytes())
            except FileNotFoundError:
                return None

        return persist(self.place, f"read {name}", look)

    def create(self, name: str, content: bytes) -> bool:
        """Whether there was none of this name; one that is there stays as it is."""
        from obstore import put
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def attempt() -> bool:
            try:
                put(self._store, name, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

        return persist(self.place, f"write {name}", attempt)

    def put(self, name: str, content: bytes | Path) -> FileStat:
        """Write an object, in the place of one that is there; returns what the store has then."""
        from obstore import head, put

        try:
            nbytes = content.stat().st_size if isinstance(content, Path) else len(content)
        except OSError as error:
            raise explain_os_error(error, f"cannot read {content!s}") from None
        part = max(PART, -(-nbytes // MOST_PARTS))

        def attempt() -> FileStat:
            put(self._store, name, content, chunk_size=part, max_concurrency=CONNECTIONS)
            return stat_of(head(self._store, name))

        stat = persist(self.place, f"write {name}", attempt)
        if stat.nbytes != nbytes:
            raise KconvertError(
                f"{self.place} has {stat.nbytes:,} bytes of {name} where {nbytes:,} were sent; run the same command again when "
                "nobody else writes there"
            )
        return stat

    def copy(self, name: str, target: str) -> None:
        """The same content under another name."""
        from obstore import copy

        persist(self.place, f"write {target}", lambda: copy(self._store, name, target))

    def delete(self, names: Collection[str]) -> None:
        """Remove objects, in no order; those that are not there are no matter."""
        from obstore import delete

        def attempt(paths: list[str]) -> None:
            try:
                delete(self._store, paths)
            except FileNotFoundError:  # which some stores say when somebody else was quicker
                for path in paths if len(paths) > 1 else ():
                    attempt([path])

        if names:
            persist(self.place, f"remove {min(names)}", lambda: attempt(sorted(names)))
