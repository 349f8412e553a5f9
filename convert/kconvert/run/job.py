"""A plan that is carried out: prepared, run and finished, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from kconvert.run.disk import Needs, check_paths, check_places, check_side_files, survey
from kconvert.run.engine import Limits, Run, warm_up
from kconvert.run.state.finalize import Closed, finalize, finalize_complete, leave
from kconvert.run.state.finalize import is_closed as is_closed_here
from kconvert.run.state.heads import Record
from kconvert.run.state.journal import UPLOAD, Journal, finished_shards, with_sent
from kconvert.run.state.outline import Outline, closing
from kconvert.run.state.ranks import Rank
from kconvert.run.state.stored import Stored, finalize_complete_stored, is_closed_stored
from kconvert.run.trace import Trace
from kconvert.run.values import check_values


@dataclass(frozen=True)
class Terms:
    """On what terms a plan is carried out; see kconvert.convert."""

    overwrite: bool = False
    disk_budget: int | None = None
    rank: Rank | None = None
    closes: bool = False  # finalize_when_complete
    check_first: bool = False
    driver: bool = False  # of ranks that Ray starts
    surveyed: bool = False  # by the driver of this rank, which has looked at DST for all of them

    def check(self, plan: Plan, delivery: Delivery) -> None:
        """KconvertError for what ranks cannot do, and what cannot be done with a source that is elsewhere."""
        if self.check_first and plan.source is not None and plan.source.directory is None:
            raise KconvertError(
                f"{plan.source.name} is looked into as it arrives, so --check-first can read nothing first; leave it out, or "
                "download the checkpoint"
            )
        if self.driver and self.rank is not None:
            raise KconvertError("--engine ray numbers its workers itself; leave out it or --worker")
        if self.rank is None and self.closes:
            raise KconvertError("--finalize-when-complete is for ranks; give --worker, or leave it out")
        if self.rank is None and not self.driver:
            return
        if delivery.push is not None:
            raise KconvertError(
                "ranks cannot send to the Hub, where one commit has to name all shards; let DST be a directory, and when it is "
                "complete give the same command without ranks --push, which sends what is there"
            )
        if self.overwrite:
            raise KconvertError(
                "ranks replace nothing, as they begin at different times; leave out --overwrite and clear DST"
            )


def check(plan: Plan, delivery: Delivery, terms: Terms) -> Needs:
    """What a run would have to do, and needs for it; see kconvert.check."""
    terms.check(plan, delivery)
    delivery = delivery.of(terms.rank)
    stored = _stored(plan, delivery)
    there = {} if terms.overwrite else _published(plan, delivery, stored)
    return survey(plan, delivery, there, terms.disk_budget) if there else _check(plan, delivery, terms, stored)


@contextmanager
def prepared(plan: Plan, delivery: Delivery, terms: Terms, command: str, card: Card) -> Iterator[Job]:
    """The job of carrying out `plan`, while it holds the output's directory; everything is as sound as can be seen by now."""
    terms.check(plan, delivery)
    delivery = delivery.of(terms.rank)
    stored = _stored(plan, delivery)
    if not terms.overwrite and _published(plan, delivery, stored):
        yield Done(terms.rank.nbytes(plan) if terms.rank else plan.output_bytes, delivery)
        return
    needs = _check(plan, delivery, terms, stored)
    if terms.rank is not None and _is_idle(terms.rank, needs, stored):
        yield Done(terms.rank.nbytes(plan), delivery)
    else:
        with _conversion(plan, needs, terms, command, card, stored) as job:
            yield job
    if terms.closes:
        close_complete(delivery)


def close_complete(delivery: Delivery) -> Closed | None:
    """Close DST where no rank has anything left to do; None where one has, who will do this in its turn."""
    if delivery.store is not None:
        return finalize_complete_stored(delivery.store)
    return finalize_complete(delivery.directory)


def is_closed(delivery: Delivery) -> bool:
    """Whether ranks have nothing more to do with DST."""
    return is_closed_stored(delivery.store) if delivery.store is not None else is_closed_here(delivery.directory)


def _stored(plan: Plan, delivery: Delivery) -> Stored | None:
    """DST in a store, which is looked at once for all that is to be known before the first shard."""
    return None if delivery.store is None else Stored(delivery.store, plan)


def _published(plan: Plan, delivery: Delivery, stored: Stored | None) -> dict[str, Record]:
    """Records of all shards when the repository or the store that DST is has the output of `plan` already; else none."""
    return published(plan, delivery) if stored is None else stored.published()


@contextmanager
def _conversion(
    whole: Plan, needs: Needs, terms: Terms, command: str, card: Card, stored: Stored | None
) -> Iterator[Conversion]:
    plan, delivery = needs.plan, needs.delivery
    with ThreadPoolExecutor(1) as background:
        if len(needs.settled) < len(plan.shards):
            background.submit(warm_up, plan)
        if (source := plan.source) is not None:
            source.check_index()
            if terms.check_first:
                check_values(plan, needs.settled)
        with _journal(needs, terms, command) as journal:
            if journal.todo != needs.todo:  # another run was at work until now
                needs = _check(whole, delivery, terms, stored)
            if stored is not None:
                stored.begin(terms.overwrite, terms.rank, command, not journal.todo)
            elif terms.rank is not None and terms.rank.index == 0:
                leave(plan, journal, closing(delivery.directory / STATE_DIR))
            yield Conversion(needs, journal, command, card, terms.rank)


def _journal(needs: Needs, terms: Terms, command: str) -> Journal:
    plan, delivery, rank = needs.plan, needs.delivery, terms.rank
    if delivery.store is None:
        return Journal(delivery.directory, plan, terms.overwrite, delivery.push, command, rank)
    shares = frozenset(shard.name for shard in plan.shards if shard.name not in needs.others)
    return Journal(delivery.directory, plan, True, None, command, sent=_sent(needs.finished), shares=shares)


def _sent(finished: Mapping[str, Record]) -> dict[str, Record]:
    """The records of what a store has."""
    return {name: {UPLOAD: record[UPLOAD]} for name, record in finished.items() if UPLOAD in record}


def _check(plan: Plan, delivery: Delivery, terms: Terms, stored: Stored | None) -> Needs:
    """What is still to be done, and what that takes; KconvertError when it cannot be."""
    if plan.source is not None and plan.source.directory is not None:
        check_paths(plan.source.untouched, delivery.directory)
        check_side_files(plan.source.directory, plan.side_files)
    if stored is not None:
        check_places(plan.source, stored.place)
        sent = stored.finished(terms.overwrite, terms.rank)
        # What is on the way to a store is ours alone: whatever lies there is replaced.
        finished = with_sent(finished_shards(delivery.directory, plan, overwrite=True), sent)
    else:
        finished = finished_shards(
            delivery.directory, plan, terms.overwrite, delivery.push, terms.rank, alone=terms.surveyed
        )
    needs = survey(plan, delivery, finished, terms.disk_budget, terms.rank)
    # The disk is that of all ranks, or each has its own.
    elsewhere = terms.driver if stored is not None or terms.disk_budget is not None else terms.surveyed
    if not elsewhere:
        needs.check(terms.overwrite or stored is not None)
    check_repository(plan, delivery, finished, terms.overwrite)
    return needs


def _is_idle(rank: Rank, needs: Needs, stored: Stored | None) -> bool:
    """Whether a rank has nothing to do, as all its shards are there, and it need not leave the small files or has."""
    delivery = needs.delivery
    if stored is not None:
        sent = _sent(needs.finished).keys() | set(needs.others)
        return len(sent) == len(needs.plan.shards) and (rank.index != 0 or stored.has_small_files)
    if len(needs.settled) < len(needs.plan.shards):
        return False
    state = delivery.directory / STATE_DIR
    outline = Outline.read(state)
    if outline is None:
        return rank.index != 0 or all(exists(delivery.directory / name) for name in needs.plan.texts)
    return rank.index != 0 or outline.is_closable(state)


class Job(Protocol):
    """To be run once, and finished then."""

    @property
    def earlier(self) -> int:
        """Bytes of output that are there already."""

    def run(self, limits: Limits, advance: Callable[[int], None], trace: Trace) -> dict[str, int]:
        """Write every shard that is not finished, and send those that go on from here; returns what `kconvert.convert` does."""

    def finish(self) -> None:
        """Make a checkpoint of the shards, here and on the Hub; of ranks, the last one does."""


class Done:
    """Nothing is left to do: the Hub or a store has the output, or DST all of a rank's shards.

    What an earlier run may have left on the way there goes.
    """

    def __init__(self, earlier: int, delivery: Delivery) -> None:
        self.earlier = earlier
        self._delivery = delivery

    def run(self, limits: Limits, advance: Callable[[int], None], trace: Trace) -> dict[str, int]:
        return {}

    def finish(self) -> None:
        self._delivery.clear()


class Conversion:
    """The engine, and what it tells of its shards to those who bring files and send them."""

    def __init__(self, needs: Needs, journal: Journal, command: str, card: Card, rank: Rank | None) -> None:
        ledger = Ledger(needs.schedule, needs.room)
        self._plan, self._journal, self._command = needs.plan, journal, command
        self._delivery, self._rank = needs.delivery, rank
        self._arrivals = Arrivals(needs, ledger)
        self._departures = Departures(needs, journal, ledger, self._arrivals.reader, card)
        mine = journal.shares & journal.finished.keys()
        self.earlier = sum(shard.nbytes for shard in self._plan.shards if shard.name in mine)

    def run(self, limits: Limits, advance: Callable[[int], None], trace: Trace) -> dict[str, int]:
        with self._departures, self._arrivals, trace:
            observers = (self._departures, self._arrivals)
            run = Run(self._plan, self._journal.todo, self._arrivals, self._journal, limits, advance, observers, trace)
            run.execute()
        return dict(run.inexact)

    def finish(self) -> None:
        if self._delivery.store is not None:
            if self._rank is None:
                Stored(self._delivery.store, self._plan).close()
            self._delivery.clear()
        elif self._rank is None:
            finalize(self._plan, self._journal)
            self._departures.commit(self._command)
