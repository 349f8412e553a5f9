"""A plan that is carried out: prepared, run and finished, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from kconvert.planning.plan import Plan
from kconvert.run.arrivals import Arrivals
from kconvert.run.budget import Ledger
from kconvert.run.delivery import Delivery
from kconvert.run.departures import Card, Departures, check_repository, published
from kconvert.run.disk import Needs, survey
from kconvert.run.engine import Limits, Run, warm_up
from kconvert.run.finalize import finalize
from kconvert.run.journal import Journal, finished_shards
from kconvert.run.preflight import check_paths, check_side_files, check_values


def check(plan: Plan, delivery: Delivery, overwrite: bool, disk_budget: int | None) -> Needs:
    """What a run would have to do, and needs for it; see kconvert.check."""
    there = {} if overwrite else published(plan, delivery)
    return survey(plan, delivery, there, disk_budget) if there else _check(plan, delivery, overwrite, disk_budget)


@contextmanager
def prepared(
    plan: Plan, delivery: Delivery, overwrite: bool, disk_budget: int | None, command: str, card: Card
) -> Iterator[Job]:
    """The job of carrying out `plan`, while it holds the output's directory; everything is as sound as can be seen by now."""
    if not overwrite and published(plan, delivery):
        yield Done(plan, delivery)
        return
    needs = _check(plan, delivery, overwrite, disk_budget)
    with ThreadPoolExecutor(1) as background:
        if len(needs.finished) < len(plan.shards):
            background.submit(warm_up, plan)
        if (source := plan.source) is not None:
            with source.reader() as reader:
                source.check_index()
                if source.directory is not None:  # files on the Hub are looked into as they arrive
                    check_values(plan, needs.finished, reader, source.directory)
        with Journal(delivery.directory, plan, overwrite, delivery.push, command) as journal:
            yield Conversion(needs, journal, command, card)


def _check(plan: Plan, delivery: Delivery, overwrite: bool, disk_budget: int | None) -> Needs:
    """What is still to be done, and what that takes; KconvertError when it cannot be."""
    if plan.source is not None and plan.source.directory is not None:
        check_paths(plan.source.directory, delivery.directory)
        check_side_files(plan.source.directory, plan.side_files)
    finished = finished_shards(delivery.directory, plan, overwrite, delivery.push)
    needs = survey(plan, delivery, finished, disk_budget)
    needs.check(overwrite)
    check_repository(plan, delivery, finished, overwrite)
    return needs


class Job(Protocol):
    """To be run once, and finished then."""

    @property
    def earlier(self) -> int:
        """Bytes of output that are there already."""

    def run(self, limits: Limits, advance: Callable[[int], None]) -> dict[str, int]:
        """Write every shard that is not finished, and send those that go to the Hub; returns what `kconvert.convert` does."""

    def finish(self) -> None:
        """Make a checkpoint of the shards, here and on the Hub."""


class Done:
    """The Hub has the output; what an earlier run may have left on the way there goes."""

    def __init__(self, plan: Plan, delivery: Delivery) -> None:
        self.earlier = plan.output_bytes
        self._delivery = delivery

    def run(self, limits: Limits, advance: Callable[[int], None]) -> dict[str, int]:
        return {}

    def finish(self) -> None:
        self._delivery.clear()


class Conversion:
    """The engine, and what it tells of its shards to those who bring files and send them."""

    def __init__(self, needs: Needs, journal: Journal, command: str, card: Card) -> None:
        ledger = Ledger(needs.schedule, needs.room)
        self._plan, self._journal, self._command = needs.plan, journal, command
        self._arrivals = Arrivals(needs, journal.finished, ledger)
        self._departures = Departures(needs, journal, ledger, self._arrivals.reader, card)
        self.earlier = sum(shard.nbytes for shard in self._plan.shards if shard.name in journal.finished)

    def run(self, limits: Limits, advance: Callable[[int], None]) -> dict[str, int]:
        with self._departures, self._arrivals:
            observers = (self._departures, self._arrivals)
            run = Run(self._plan, self._arrivals, self._journal, limits, advance, observers)
            run.execute()
        return dict(run.inexact)

    def finish(self) -> None:
        finalize(self._plan, self._journal)
        self._departures.commit(self._command)
