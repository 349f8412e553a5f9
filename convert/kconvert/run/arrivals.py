"""Source files come to the disk before a plan needs them, and leave when it does not.

Downloads, the conversion and uploads go on at the same time. The ledger decides who may take how much of the disk.
"""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

from kconvert.checkpoint.download import Line, fetch
from kconvert.checkpoint.remote import RemoteCheckpoint
from kconvert.checkpoint.source import Reader
from kconvert.run.budget import Ledger
from kconvert.run.disk import Needs, unfinished
from kconvert.run.mover import Mover

DOWNLOADS = 4  # connections at a time; one seldom fills a fast line


class StagedReader(Reader):
    """Reads of files that lie in different places."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.places: dict[str, Path] = {}

    def path(self, file: str) -> Path:
        return self.places.get(file) or super().path(file)


class Arrivals(Mover):
    """The source of a run, where its files come from elsewhere; within a budget they are here only as long as needed."""

    def __init__(self, needs: Needs, ledger: Ledger) -> None:
        super().__init__(ledger)
        plan = needs.plan
        self._needs, self._plan = needs, plan
        self.reader = StagedReader(plan.source.root if plan.source else Path())
        self._here: set[str] = set()
        self._needed_by: dict[str, set[str]] = defaultdict(set)
        for shard, files in needs.schedule.sources.items():
            for file in files & needs.fetches.keys():
                self._needed_by[file].add(shard)
        self._lock = threading.Lock()
        self._line = Line(DOWNLOADS)
        self._side_files: SimpleQueue[str] = SimpleQueue()

    def __enter__(self) -> Arrivals:
        self._needs.clear_staged()
        for name in self._plan.side_files:
            self._side_files.put(name)
        self._start(self._bring_files, DOWNLOADS if self._needs.fetches else 0)
        return self

    def is_here(self, file: str) -> bool:
        return file in self._here or file not in self._needs.fetches

    def await_file(self, file: str) -> None:
        self._ledger.wait(lambda: file in self._here)

    def fetch(self, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        """Bytes of a source file that is here."""
        return self.reader.fetch(file, start, nbytes, room)

    def finish(self, shard: str) -> None:
        """What only this shard needed goes."""
        with self._lock:
            for file in self._needs.schedule.sources[shard] & self._needs.fetches.keys():
                self._needed_by[file].discard(shard)
                if not self._needed_by[file]:
                    self._drop(file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self.reader.close()
        if error is None:
            shutil.rmtree(self._needs.staged, ignore_errors=True)

    def _bring_files(self) -> None:
        while (file := self._ledger.next_source()) is not None:
            self.reader.places[file] = self._bring(file)
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
        source, target = self._plan.source, self._needs.places[file]
        assert isinstance(source, RemoteCheckpoint)
        if not target.exists():
            fetch(source, self._needs.fetches[file], target, unfinished(target), self._line.turn(self._stopped))
        if target.is_relative_to(self._needs.staged):
            return target
        return source.cached(file) or source.keep(file)

    def _drop(self, file: str) -> None:
        self.reader.forget(file)
        path = self.reader.places.get(file)
        if path is not None and path.is_relative_to(self._needs.staged):
            path.unlink(missing_ok=True)
        self._ledger.release(("source", file))
