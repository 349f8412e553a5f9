"""Source files come to the disk before a plan needs them and leave when it does not; finished shards may leave for the Hub.

Downloads, the conversion and uploads go on at the same time. The ledger decides who may take how much of the disk.
"""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from kconvert.checkpoint.files import PAGE
from kconvert.checkpoint.source import Reader
from kconvert.run.arrivals import hub_source
from kconvert.run.budget import Ledger
from kconvert.run.disk import Needs, unfinished
from kconvert.run.journal import Journal, Record
from kconvert.run.preflight import Doubt, check_doubts, doubtful_values

DOWNLOADS = 4  # connections at a time; one seldom fills a fast line
UPLOADS = 2


class Outbox(Protocol):
    """Takes finished shards; see hub.upload.Upload."""

    def has(self, upload: Record) -> bool: ...

    def send(self, name: str, path: Path) -> Record: ...


class Witness(Protocol):
    """What is to be remembered of a shard, told while all that it was made of is still here; see proof.spot_check."""

    def __call__(self, shard: str, source: Reader, output: Reader) -> Mapping[str, Any]: ...


class StagedReader(Reader):
    """Reads of files that lie in different places."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.places: dict[str, Path] = {}
        self.fresh: set[str] = set()

    def path(self, file: str) -> Path:
        return self.places.get(file) or super().path(file)

    def fetch(self, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        """By way of the page cache where the file has just arrived, most of which is still there."""
        if file not in self.fresh:
            return super().fetch(file, start, nbytes, room)
        view = room[start % PAGE :][:nbytes]
        self._fill(file, self._cached, start, view, nbytes)
        return view


class Staging:
    """The `engine.Stage` of a run, and a context manager.

    Within a budget, source files are here only as long as they are needed, and shards leave the disk once they are sent.
    """

    def __init__(self, needs: Needs, journal: Journal, outbox: Outbox | None, witness: Witness) -> None:
        plan = needs.plan
        self._needs, self._plan, self._journal = needs, plan, journal
        self._outbox, self._witness = outbox, witness
        self._ledger = Ledger(needs.schedule, needs.room)
        self._reader = StagedReader(plan.source.root if plan.source else Path())
        self._here: set[str] = set()
        self._needed_by: dict[str, set[str]] = defaultdict(set)
        for shard, files in needs.schedule.sources.items():
            for file in files & needs.fetches.keys():
                self._needed_by[file].add(shard)
        self._doubts: dict[str, list[Doubt]] = defaultdict(list)
        for doubt in doubtful_values(plan, journal.finished) if needs.fetches else ():
            self._doubts[doubt.place.file].append(doubt)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._finished: SimpleQueue[str | None] = SimpleQueue()
        self._side_files: SimpleQueue[str] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Staging:
        self._needs.clear_staged()
        for shard in self._journal.finished if self._outbox is not None else ():
            self._finished.put(shard)
        for name in self._plan.side_files:
            self._side_files.put(name)
        self._start(self._bring_files, DOWNLOADS if self._needs.fetches else 0)
        self._start(self._send_shards, UPLOADS if self._outbox is not None else 0)
        return self

    def _start(self, work: Callable[[], None], count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._guard, args=(work,), name=work.__name__, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:
            self._ledger.fail(failure)

    def fetch(self, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        """Bytes of a source file, as soon as it is here."""
        if file in self._needs.fetches and file not in self._here:
            self._ledger.wait(lambda: file in self._here)
        return self._reader.fetch(file, start, nbytes, room)

    def admit(self, shard: str) -> None:
        """Wait until there is room for a shard."""
        self._ledger.check()
        self._ledger.admit(("output", shard))

    def finish(self, shard: str) -> None:
        """What only this shard needed goes, and the shard is on its way."""
        if self._outbox is not None:
            with Reader(self._journal.destination) as output:
                self._journal.note(shard, **self._witness(shard, self._reader, output))
        with self._lock:
            for file in self._needs.schedule.sources[shard] & self._needs.fetches.keys():
                self._needed_by[file].discard(shard)
                if not self._needed_by[file]:
                    self._drop(file)
        if self._outbox is not None:
            self._finished.put(shard)

    def stop(self, failure: BaseException) -> None:
        self._stopped.set()
        self._ledger.fail(failure)

    def drain(self) -> None:
        """Wait until every finished shard has been sent."""
        for _ in range(UPLOADS):
            self._finished.put(None)
        for thread in self._threads:
            thread.join()
        self._ledger.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.stop(error)
        for _ in range(UPLOADS):
            self._finished.put(None)
        for thread in self._threads:
            thread.join()
        self._reader.close()
        if error is None:
            shutil.rmtree(self._needs.staged, ignore_errors=True)

    def _bring_files(self) -> None:
        while (file := self._ledger.next_source()) is not None:
            self._reader.places[file] = self._bring(file)
            assert self._plan.source is not None
            check_doubts(self._plan.source.root, self._reader, self._doubts.pop(file, []))
            with self._ledger.changed:
                self._here.add(file)
                self._ledger.changed.notify_all()

        self._bring_side_files()

    def _bring_side_files(self) -> None:
        """While the last files are converted; the end of the run then finds them in the Hub's cache."""
        assert self._plan.source is not None
        with suppress(Empty):
            while not self._stopped.is_set():
                self._plan.source.side_file(self._side_files.get_nowait())

    def _bring(self, file: str) -> Path:
        from kconvert.hub.client import into_cache
        from kconvert.hub.download import cached, fetch

        place, target = hub_source(self._plan).place, self._needs.places[file]
        if not target.exists():
            fetch(place, self._needs.fetches[file], target, unfinished(target), self._stopped)
            self._reader.fresh.add(file)
        if target.is_relative_to(self._needs.staged) or cached(place, file):
            return target
        return into_cache(place, file)  # which finds the content there, and links it

    def _drop(self, file: str) -> None:
        self._reader.forget(file)
        path = self._reader.places.get(file)
        if path is not None and path.is_relative_to(self._needs.staged):
            path.unlink(missing_ok=True)
        self._ledger.release(("source", file))

    def _send_shards(self) -> None:
        assert self._outbox is not None
        while (shard := self._finished.get()) is not None and not self._stopped.is_set():
            path = self._journal.destination / shard
            if not self._outbox.has(self._journal.finished[shard].get("upload", {})):
                self._journal.note(shard, upload=self._outbox.send(shard, path))
            if self._needs.leaving and path.exists():
                path.unlink()
                self._ledger.release(("output", shard))
