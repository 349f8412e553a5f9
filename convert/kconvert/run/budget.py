"""What lies on the disk at each moment of a plan, and how little of it there can be.

A plan's steps are taken in order. A source file that comes from the Hub must be there from the first step that reads it
until every output shard that takes something from it is finished; an output shard from its first step on, for good unless
it leaves for the Hub. Room is granted strictly in the order of first need. So whoever waits for room waits only for what
earlier steps hold, these can always be finished, and a budget suffices exactly if no step needs more than it at once.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from kconvert.errors import KconvertError, human
from kconvert.planning.plan import Plan

Key: TypeAlias = tuple[Literal["source", "output", "rest"], str]


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` of a file on the disk from step `first` to step `last`, both included."""

    key: Key
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Schedule:
    """What needs room, in the order of first need; `sources` names the arriving files that each output shard needs."""

    spans: tuple[Span, ...]
    sources: Mapping[str, frozenset[str]]

    @property
    def peak(self) -> int:
        """The smallest budget that works, in bytes."""
        changes: dict[int, int] = defaultdict(int)
        for span in self.spans:
            changes[span.first] += span.nbytes
            changes[span.last + 1] -= span.nbytes
        return max(accumulate(changes[step] for step in sorted(changes)), default=0)

    def check(self, budget: int | None) -> None:
        """KconvertError when the budget is too small."""
        if budget is not None and self.peak > budget:
            raise KconvertError(
                f"a disk budget of {human(budget)} is too small for this plan; the smallest that works is {self.peak} bytes "
                f"({human(self.peak)})"
            )


def make_schedule(
    plan: Plan,
    finished: Collection[str],
    arriving: Mapping[str, int],
    present: Collection[str] = (),
    gone: Collection[str] | None = None,
    others: Collection[str] = (),
) -> Schedule:
    """The schedule of what is still to be done.

    `finished` are the shards that are complete, `arriving` the bytes on the disk of each source file that comes from the
    Hub, `present` those of them that are there already. `gone`, when given, are the shards that have left the disk for the
    Hub, as every shard will once it is finished. `others` are those that somebody else writes.
    """
    begins: dict[str, int] = {}  # of output shards and of source files, which may have the same names
    ends: dict[str, int] = {}
    needed: dict[str, int] = {}
    sources: dict[str, set[str]] = defaultdict(set)
    for number, step in enumerate(plan.steps):
        files = {place.file for place in step.origins} & arriving.keys() if arriving else ()
        for shard in {place.file for place in step.writes}:
            if shard not in finished:
                begins.setdefault(shard, number)
                ends[shard] = number
                sources[shard].update(files)
                for file in files:
                    needed.setdefault(file, number)
    keep: dict[str, int] = defaultdict(int)
    for shard, files in sources.items():
        for file in files:
            keep[file] = max(keep[file], ends[shard])
    spans = [
        Span(("source", file), nbytes, 0 if file in present else needed[file], keep[file])
        for file, nbytes in arriving.items()
        if file in needed
    ]
    for output in plan.shards:
        if output.name not in others and (gone is None or output.name not in gone):
            last = len(plan.steps) if gone is None else ends.get(output.name, 0)
            spans.append(Span(("output", output.name), output.nbytes, begins.get(output.name, 0), last))
    rest = plan.output_bytes - sum(output.nbytes for output in plan.shards)
    spans.append(Span(("rest", ""), rest, 0, len(plan.steps)))
    spans.sort(key=lambda span: span.first)
    return Schedule(tuple(spans), {shard: frozenset(files) for shard, files in sources.items()})


class Ledger:
    """Grants room on the disk in the order of a schedule, never more than the budget; for any number of threads."""

    def __init__(self, schedule: Schedule, budget: int | None) -> None:
        self._budget = budget
        self._room = {span.key: span.nbytes for span in schedule.spans}
        self._waiting = deque(span.key for span in schedule.spans)
        self._arrivals: deque[str] = deque()
        self._granted: set[Key] = set()
        self._held = 0
        self._failure: BaseException | None = None
        self.changed = threading.Condition()
        with self.changed:
            self._grant()

    def _grant(self) -> None:
        while self._waiting and (self._budget is None or self._held + self._room[self._waiting[0]] <= self._budget):
            key = self._waiting.popleft()
            self._held += self._room[key]
            self._granted.add(key)
            if key[0] == "source":
                self._arrivals.append(key[1])
        self.changed.notify_all()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until `ready()`; raises the failure when there is one."""
        with self.changed:
            self.changed.wait_for(lambda: ready() or self._failure is not None)
            if self._failure is not None:
                raise self._failure

    def admit(self, key: Key) -> None:
        """Wait until there is room."""
        if key not in self._granted:
            self.wait(lambda: key in self._granted)

    def next_source(self) -> str | None:
        """The next source file that there is room for, waiting for it; None when there are no more."""
        with self.changed:
            self.wait(lambda: bool(self._arrivals) or not self._waiting)
            return self._arrivals.popleft() if self._arrivals else None

    def release(self, key: Key) -> None:
        """What `key` holds is free, or will not be needed; once."""
        with self.changed:
            if key in self._granted:
                self._held -= self._room[key]
            else:
                self._room[key] = 0
            self._grant()

    def fail(self, failure: BaseException) -> None:
        """Whoever waits, or will, gets the first failure."""
        with self.changed:
            self._failure = self._failure or failure
            self.changed.notify_all()

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self._failure is not None:
            raise self._failure
