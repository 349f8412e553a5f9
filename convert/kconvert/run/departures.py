"""The output's way to the Hub or to an object store: shards as they are finished, and at the end what makes a checkpoint of
them: in the Hub one commit, in a store config.json and the index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from kconvert.checkpoint.source import Reader
from kconvert.planning.plan import Plan
from kconvert.run.budget import Ledger
from kconvert.run.delivery import Delivery
from kconvert.run.disk import Needs
from kconvert.run.mover import Mover
from kconvert.run.state.heads import Record
from kconvert.run.state.journal import UPLOAD, Journal
from kconvert.run.state.stored import Stored

UPLOADS = 2  # at a time


class Outbox(Protocol):
    def has(self, upload: Mapping[str, Any], /) -> bool:
        """Whether a journal's record says that the content is there."""

    def send(self, name: str, path: Path, /) -> dict[str, Any]:
        """Send the content of a shard; returns what the journal is to have of that."""


class Card(Protocol):
    """The repository's README.md; see report.card."""

    def look(self, shard: str, source: Reader, output: Reader) -> Mapping[str, Any]:
        """What is to be remembered of a shard, while all that it was made of is still here."""

    def text(self, title: str, records: Iterable[Record]) -> str:
        """The card, by what the journal has of every shard."""


class Departures(Mover):
    """Gives shards room on the disk and, where the output goes on from there, sends them once they are finished."""

    def __init__(self, needs: Needs, journal: Journal, ledger: Ledger, source: Reader, card: Card) -> None:
        super().__init__(ledger)
        self._needs, self._plan, self._journal = needs, needs.plan, journal
        self._source, self._card = source, card
        self._outbox: Outbox | None = None
        self._finished: SimpleQueue[str | None] = SimpleQueue()

    def __enter__(self) -> Departures:
        self._outbox = _open(self._needs)
        if self._outbox is not None:
            for shard in self._journal.finished:
                self._finished.put(shard)
            self._start(self._send_shards, UPLOADS)
        return self

    def admit(self, shard: str) -> None:
        """Wait until there is room for a shard."""
        self._ledger.check()
        self._ledger.admit(("output", shard))

    def finish(self, shard: str) -> None:
        """The shard is on its way."""
        if self._needs.delivery.push is not None:
            with Reader(self._journal.destination) as output:
                self._journal.note(shard, **self._card.look(shard, self._source, output))
        if self._outbox is not None:
            self._finished.put(shard)

    def _join(self) -> None:
        """Once a run has failed nobody waits for what is being sent, which may take long; what arrives is there next time."""
        for _ in self._threads:
            self._finished.put(None)
        if not self._stopped.is_set():
            super()._join()

    def _send_shards(self) -> None:
        assert self._outbox is not None
        while (shard := self._finished.get()) is not None and not self._stopped.is_set():
            path = self._journal.destination / shard
            if not self._outbox.has(self._journal.finished[shard].get(UPLOAD, {})):
                upload = self._outbox.send(shard, path)
                if self._stopped.is_set():
                    return  # the journal may be another run's by now
                self._journal.note(shard, upload=upload)
            if self._needs.leaving and path.exists():
                path.unlink()
                self._ledger.release(("output", shard))

    def commit(self, command: str) -> None:
        """Show what was sent to the Hub, with the small files of the directory and the card."""
        plan, delivery = self._plan, self._needs.delivery
        if self._outbox is None or delivery.push is None:
            return
        from kconvert.hub.upload import Upload

        assert isinstance(self._outbox, Upload)
        records = {shard.name: self._journal.finished[shard.name] for shard in plan.shards}
        uploads = {name: record["upload"] for name, record in records.items()}
        digests = {name: upload["sha256"] for name, upload in uploads.items()}
        card = self._card.text(delivery.push.repo.partition("/")[2], records.values())
        sealed = f"{card}\n{_seal(plan, digests)}\n".encode()
        files = {name: delivery.directory / name for name in (*plan.side_files, *plan.texts)}
        self._outbox.commit(uploads, files, sealed, f"Add the output of {command.partition(' -')[0]}")
        delivery.clear()


def published(plan: Plan, delivery: Delivery) -> dict[str, Record]:
    """Records of all shards when the repository that DST is has the output of `plan` already; else none."""
    if delivery.push is None or not delivery.passing:
        return {}
    from kconvert.hub.front_matter import CARD
    from kconvert.hub.repository import list_files, small_file
    from kconvert.hub.upload import head

    place = head(delivery.push)
    files = list_files(place) if place is not None and place.revision else {}
    shards = [shard.name for shard in plan.shards]
    if place is None or not files.keys() >= {CARD, *shards, *plan.texts, *plan.side_files}:
        return {}
    digests = {name: files[name].stamp.removeprefix("sha256:") for name in shards}
    card = small_file(place, CARD, files[CARD]).read_text("utf-8", errors="replace")
    if _seal(plan, digests) not in card:
        return {}
    return {name: {"upload": {"repo": delivery.push.repo, "sha256": digest}} for name, digest in digests.items()}


def check_repository(plan: Plan, delivery: Delivery, finished: Mapping[str, Record], overwrite: bool) -> None:
    """KconvertError when the repository has something else in it; it need not exist yet."""
    if delivery.push is None:
        return
    from kconvert.hub.upload import check_target

    # An earlier run may have made the commit and been killed before it knew.
    begun = any(record.get("upload", {}).get("repo") == delivery.push.repo for record in finished.values())
    ours = {shard.name for shard in plan.shards} | plan.texts.keys() | plan.side_files.keys()
    check_target(delivery.push, ours if begun else (), overwrite)


def _open(needs: Needs) -> Outbox | None:
    if needs.delivery.store is not None:
        return Stored(needs.delivery.store, needs.plan)
    if needs.delivery.push is None:
        return None
    from kconvert.hub.upload import Upload

    return Upload(needs.delivery.push)


def _seal(plan: Plan, digests: Mapping[str, str]) -> str:
    """A line that no other plan, source or shards would have: by it a later run knows that the output is there already."""
    text = f"{plan.hash} {plan.stamp} {sorted(digests.items())}"
    return f"<!-- kconvert {hashlib.sha256(text.encode()).hexdigest()} -->"
