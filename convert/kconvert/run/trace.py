"""What the workers of a run do when: sums that say what held it up, and on request a file that shows all of it.

The file is in Chrome's trace format (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, the array
form, whose end may be missing), which Perfetto and chrome://tracing draw: a row a worker.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, get_args

from kconvert.checkpoint.buffers import Fetcher
from kconvert.errors import KconvertError, explain_os_error

Thing = TypeVar("Thing")
Doing = Literal["read", "decode", "encode", "write", "wait"]
BOUNDS: dict[Doing, str] = {
    "read": "disk read",
    "write": "disk write",
    "wait": "line",
    "decode": "cores",
    "encode": "cores",
}
BUSY = 0.85  # of what the cores could do in the time: more, and it was they that a run waited for
UNSEEN = 1_000_000  # nanoseconds, for which nobody waits
KEPT_EVENTS = 1000  # of a worker, before they are written


class Trace:
    """Of one run. `path` is the file that is to show it; without one there are only the sums.

    A context manager: it measures from entering to leaving, and then the file is whole.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._clocks: list[Clock] = []

    @property
    def is_drawn(self) -> bool:
        """Whether a file is to show it."""
        return self._path is not None

    def check_outside(self, source: Path) -> None:
        """KconvertError where the file would lie in SRC, and might take the place of one of its own."""
        if self._path is not None and Path(os.path.realpath(self._path)).is_relative_to(os.path.realpath(source)):
            raise KconvertError(f"--trace {self._path} lies inside SRC; choose a file outside {source}")

    def clock(self) -> Clock:
        """For another worker."""
        with self._lock:
            clock = Clock(self, len(self._clocks), self.is_drawn)
            self._clocks.append(clock)
        return clock

    @property
    def seconds(self) -> dict[Doing, float]:
        """What all workers together have spent on what."""
        return {doing: sum(clock.seconds[doing] for clock in self._clocks) for doing in get_args(Doing)}

    @property
    def bound(self) -> str | None:
        """What the run was waiting for most: `cores`, `disk read`, `disk write` or the `line`; None where it did nothing.

        Cores are it when all were busy, or when workers, who may be few, have spent most of their time computing.
        """
        spent: defaultdict[str, float] = defaultdict(float)
        for doing, seconds in self.seconds.items():
            spent[BOUNDS[doing]] += seconds
        if not any(spent.values()):
            return None
        if self._busy >= BUSY * self._wall * len(os.sched_getaffinity(0)):
            return "cores"
        return max(spent, key=lambda bound: spent[bound])

    def __enter__(self) -> Trace:
        if self.is_drawn:
            self._append("[\n", "w")
        self._began = time.perf_counter_ns()
        self._wall, self._busy = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wall += time.perf_counter()
        self._busy += time.process_time()
        if self.is_drawn:
            for clock in self._clocks:
                clock.flush()
            self._append("{}]\n")

    @contextmanager
    def all_waiting(self, what: str) -> Iterator[None]:
        """While no worker has anything left to do, and all wait for this."""
        began = time.perf_counter_ns()
        try:
            yield
        finally:
            took = time.perf_counter_ns() - began
            for clock in self._clocks if took > UNSEEN else ():
                clock.add("wait", what, began, took)

    def keep(self, events: list[dict[str, Any]]) -> None:
        """Append events to the file; their times are of `time.perf_counter_ns`."""
        moved = (event | {"ts": (event["ts"] - self._began) / 1000} for event in events)
        self._append("".join(f"{json.dumps(event)},\n" for event in moved))

    def _append(self, text: str, mode: Literal["a", "w"] = "a") -> None:
        assert self._path is not None
        try:
            with self._lock, self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as failure:
            raise explain_os_error(failure, f"cannot write {self._path}") from None


class Source(Fetcher, Protocol):
    """Where a run's bytes come from, whose files may still be on their way."""

    def is_here(self, file: str) -> bool: ...

    def await_file(self, file: str) -> None: ...


class Watched:
    """A source whose reads a clock measures, and apart from them the waiting for files that are not here yet."""

    def __init__(self, source: Source, clock: Clock) -> None:
        self._source, self._clock = source, clock

    def fetch(self, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        if not self._source.is_here(file):
            with self._clock.on("wait", file):
                self._source.await_file(file)
        with self._clock.on("read", file):
            return self._source.fetch(file, start, nbytes, room)


class Clock:
    """One worker's; nobody else has it as long as that is at work."""

    def __init__(self, trace: Trace, number: int, keeping: bool) -> None:
        self.seconds: dict[Doing, float] = dict.fromkeys(get_args(Doing), 0.0)
        self._trace, self._number = trace, number
        self._events: list[dict[str, Any]] | None = [] if keeping else None

    @contextmanager
    def on(self, doing: Doing, what: str = "") -> Iterator[None]:
        """While the worker does this with `what`; nothing else is measured inside."""
        began = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(doing, what, began, time.perf_counter_ns() - began)

    def each(self, doing: Doing, what: str, things: Iterable[Thing]) -> Iterator[Thing]:
        """The same things; while the worker makes one, it does this."""
        iterator = iter(things)
        while True:
            with self.on(doing, what):
                thing = next(iterator, None)
            if thing is None:
                return
            yield thing

    def add(self, doing: Doing, what: str, began: int, took: int) -> None:
        """So many nanoseconds of this, since the moment `began`."""
        self.seconds[doing] += took / 1e9
        if self._events is None:
            return
        place = {"pid": os.getpid(), "tid": self._number, "args": {"of": what}}
        self._events.append({"name": doing, "ph": "X", "ts": began, "dur": took / 1000, **place})
        if len(self._events) >= KEPT_EVENTS:
            self.flush()

    def flush(self) -> None:
        if self._events:
            self._trace.keep(self._events)
            self._events = []
