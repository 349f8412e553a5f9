"""A plan that is carried out: prepared, run and finished, each once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from kconvert.checkpoint.files import exists
from kconvert.checkpoint.listing import STATE_DIR
from kconvert.errors import KconvertError
from kconvert.planning.plan import Plan
from kconvert.run.arrivals import Arrivals
from kconvert.run.budget import Ledger
from kconvert.run.delivery import Delivery
from kconvert.run.departures import Card, Departures, check_repository, published
from kconvert.run.disk import Needs, survey
from kconvert.run.engine import Limits, Run, warm_up
from kconvert.run.preflight import check_paths, check_side_files, check_values
from kconvert.run.state.finalize import finalize, finalize_complete, leave
from kconvert.run.state.journal import Journal, finished_shards
from kconvert.run.state.outline import Outline, closing
from kconvert.run.state.ranks import Rank


@dataclass(frozen=True)
class Terms:
    """On what terms a plan is carried out; see kconvert.convert."""

    overwrite: bool = False
    disk_budget: int | None = None
    rank: Rank | None = None
    closes: bool = False  # finalize_when_complete
    driver: bool = False  # of ranks that Ray starts
    surveyed: bool = False  # by the driver of this rank, as it has looked at DST and its disk for all of them

    def check(self, plan: Plan, delivery: Delivery) -> None:
        """KconvertError for what ranks cannot do."""
        if self.driver and self.rank is not None:
            raise KconvertError("--engine ray numbers its workers itself; leave out it or --worker")
        if self.rank is None and self.closes:
            raise KconvertError("--finalize-when-complete is for ranks; give --worker, or leave it out")
        if self.rank is None and not self.driver:
            return
        if delivery.push is not None:
            raise KconvertError("ranks cannot send to the Hub; let DST be a directory, and send it when it is complete")
        if self.disk_budget is not None:
            raise KconvertError("ranks cannot keep within --disk-budget; leave it out, or let one machine do all")
        if self.overwrite:
            raise KconvertError(
                "ranks replace nothing, as they begin at different times; leave out --overwrite and clear DST"
            )
        if plan.source is not None and plan.source.directory is None:
            raise KconvertError(f"ranks cannot fetch {plan.source.name}; download it to a disk that all of them see")


def check(plan: Plan, delivery: Delivery, terms: Terms) -> Needs:
    """What a run would have to do, and needs for it; see kconvert.check."""
    terms.check(plan, delivery)
    there = {} if terms.overwrite else published(plan, delivery)
    return survey(plan, delivery, there, terms.disk_budget) if there else _check(plan, delivery, terms)


@contextmanager
def prepared(plan: Plan, delivery: Delivery, terms: Terms, command: str, card: Card) -> Iterator[Job]:
    """The job of carrying out `plan`, while it holds the output's directory; everything is as sound as can be seen by now."""
    terms.check(plan, delivery)
    if not terms.overwrite and published(plan, delivery):
        yield Done(plan.output_bytes, delivery)
        return
    needs = _check(plan, delivery, terms)
    if terms.rank is not None and _is_idle(terms.rank, needs):
        yield Done(sum(shard.nbytes for shard in plan.shards if shard.name not in needs.others), delivery)
    else:
        with _conversion(needs, terms, command, card) as job:
            yield job
    if terms.closes:
        finalize_complete(delivery.directory)


@contextmanager
def _conversion(needs: Needs, terms: Terms, command: str, card: Card) -> Iterator[Conversion]:
    plan, delivery = needs.plan, needs.delivery
    with ThreadPoolExecutor(1) as background:
        if len(needs.settled) < len(plan.shards):
            background.submit(warm_up, plan)
        if (source := plan.source) is not None:
            with source.reader() as reader:
                source.check_index()
                if source.directory is not None:  # files on the Hub are looked into as they arrive
                    check_values(plan, needs.settled, reader, source.directory)
        with Journal(delivery.directory, plan, terms.overwrite, delivery.push, command, terms.rank) as journal:
            if terms.rank is not None and terms.rank.index == 0:
                leave(plan, journal, closing(delivery.directory / STATE_DIR))
            yield Conversion(needs, journal, command, card)


def _check(plan: Plan, delivery: Delivery, terms: Terms) -> Needs:
    """What is still to be done, and what that takes; KconvertError when it cannot be."""
    if plan.source is not None and plan.source.directory is not None:
        check_paths(plan.source.directory, delivery.directory)
        check_side_files(plan.source.directory, plan.side_files)
    finished = finished_shards(
        delivery.directory, plan, terms.overwrite, delivery.push, terms.rank, alone=terms.surveyed
    )
    others: Collection[str] = frozenset()
    if terms.rank is not None:
        share = terms.rank.share(plan)
        plan, others = plan.only(share), {shard.name for shard in plan.shards} - share
    needs = survey(plan, delivery, finished, terms.disk_budget, others)
    if not terms.surveyed:
        needs.check(terms.overwrite)
    check_repository(plan, delivery, finished, terms.overwrite)
    return needs


def _is_idle(rank: Rank, needs: Needs) -> bool:
    """Whether a rank has nothing to do, as all its shards are there, and it need not leave the small files or has."""
    if len(needs.settled) < len(needs.plan.shards):
        return False
    state = needs.delivery.directory / STATE_DIR
    outline = Outline.read(state)
    if outline is None:
        return rank.index != 0 or all(exists(needs.delivery.directory / name) for name in needs.plan.texts)
    return rank.index != 0 or outline.is_closable(state)


class Job(Protocol):
    """To be run once, and finished then."""

    @property
    def earlier(self) -> int:
        """Bytes of output that are there already."""

    def run(self, limits: Limits, advance: Callable[[int], None]) -> dict[str, int]:
        """Write every shard that is not finished, and send those that go to the Hub; returns what `kconvert.convert` does."""

    def finish(self) -> None:
        """Make a checkpoint of the shards, here and on the Hub; of ranks, the last one does."""


class Done:
    """Nothing is left to do: the Hub has the output, or the directory all of a rank's shards.

    What an earlier run may have left on the way to the Hub goes.
    """

    def __init__(self, earlier: int, delivery: Delivery) -> None:
        self.earlier = earlier
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
        self._arrivals = Arrivals(needs, needs.others | journal.finished.keys(), ledger)
        self._departures = Departures(needs, journal, ledger, self._arrivals.reader, card)
        mine = journal.shares & journal.finished.keys()
        self.earlier = sum(shard.nbytes for shard in self._plan.shards if shard.name in mine)

    def run(self, limits: Limits, advance: Callable[[int], None]) -> dict[str, int]:
        with self._departures, self._arrivals:
            observers = (self._departures, self._arrivals)
            run = Run(self._plan, self._journal.todo, self._arrivals, self._journal, limits, advance, observers)
            run.execute()
        return dict(run.inexact)

    def finish(self) -> None:
        if self._journal.rank is not None:
            return
        finalize(self._plan, self._journal)
        self._departures.commit(self._command)
