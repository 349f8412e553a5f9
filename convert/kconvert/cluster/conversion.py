"""A conversion by the workers of a Ray cluster. Each task is a rank, so DST is what ranks leave, and all that they know."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kconvert.checkpoint.directory import are_links_allowed, links_allowed
from kconvert.checkpoint.listing import RANKS, STATE_DIR
from kconvert.cluster.ray import Cluster
from kconvert.errors import KconvertError, explain_os_error
from kconvert.planning.plan import Plan
from kconvert.run import job
from kconvert.run.delivery import Delivery
from kconvert.run.departures import Card
from kconvert.run.engine import WAITING, Limits
from kconvert.run.state.heads import belongs, head_at, head_of
from kconvert.run.state.journal import Journal
from kconvert.run.state.locks import LOCK, Busy, hold
from kconvert.run.state.outline import Outline
from kconvert.run.state.ranks import Rank, deal
from kconvert.run.state.stored import Stored
from kconvert.run.trace import Trace
from kconvert.run.values import check_values

ROUNDS = 8  # tasks at most for each that runs at a time, to even out the end
TASK = 8_000_000_000  # bytes, of which one is made in so many seconds that nobody sees it begin
PATIENCE = 600  # seconds for the worker of a node that was given up to end, or to lose its locks


@dataclass(frozen=True)
class Ranks:
    """The ranks of one conversion: called with a number it is that rank, in any process that sees SRC and DST."""

    again: Callable[[], Plan]
    expected: tuple[str, str]  # the plan's hash and stamp
    destination: str
    count: int
    disk_budget: int | None
    limits: Limits
    links: bool
    command: str
    card: Callable[[Plan, str], Card]

    def __call__(self, number: int, tell: Callable[[int], None]) -> dict[str, int]:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._run(Rank(number, self.count), tell)
            except Busy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _run(self, rank: Rank, tell: Callable[[int], None]) -> dict[str, int]:
        plan, delivery = self._plan, Delivery.to(self.destination)
        terms = job.Terms(rank=rank, disk_budget=self.disk_budget, surveyed=True)
        with _links(self.links), job.prepared(plan, delivery, terms, self.command, self._card) as work:
            tell(work.earlier)
            inexact = work.run(self.limits, tell, Trace())
            work.finish()
        return inexact

    @cached_property
    def _plan(self) -> Plan:
        with _links(self.links):
            plan = self.again()
        if (plan.hash, plan.stamp) != self.expected:
            raise KconvertError(
                "the plan that was made here is another than the driver's; SRC must have the same files everywhere, with the "
                "same sizes and times"
            )
        return plan

    @cached_property
    def _card(self) -> Card:
        return self.card(self._plan, self.command)


def convert_by_ray(
    plan: Plan,
    delivery: Delivery,
    terms: job.Terms,
    command: str,
    card: Callable[[Plan, str], Card],
    address: str | None,
    limits: tuple[int | None, int | None],
    advance: Callable[[int], None],
    found: Callable[[int], None],
) -> dict[str, int]:
    """Carry out `plan`, or finish what ranks have begun; see kconvert.convert. The last act is `finalize`, here."""
    if plan.again is None:
        raise KconvertError("this plan cannot be made on other machines; make it by kconvert.plan")
    settled = _settled(plan, delivery, terms)
    earlier = sum(shard.nbytes for shard in plan.shards if shard.name in settled)
    found(earlier)
    advance(earlier)
    inexact: Counter[str] = Counter()
    if len(settled) == len(plan.shards) and job.is_closed(delivery):
        return inexact
    _take_over(plan, delivery)
    with Cluster(address) as cluster, _alone(delivery) as state:
        tasks = _tasks(plan, cluster.slots)
        if delivery.store is not None:
            count = Stored(delivery.store, plan).share(tasks, command)
        else:
            count = Outline.of(plan, head_of(plan, command), tasks).put(state, f"driver.{os.getpid()}").ranks
        threads, memory = limits
        ranks = Ranks(
            plan.again,
            (plan.hash, plan.stamp),
            str(delivery.store or delivery.directory.absolute()),
            count,
            terms.disk_budget,
            Limits.choose(threads or cluster.cpus + WAITING, memory),
            are_links_allowed(),
            command,
            card,
        )
        for _, lost in cluster.call(ranks, _numbers(plan, settled, count), advance):
            inexact.update(lost)
    if job.close_complete(delivery) is None and not job.is_closed(delivery):
        raise KconvertError(
            f"somebody has touched or removed shards of {delivery} meanwhile; run the same command again, which writes them"
        )
    delivery.clear()
    return dict(inexact)


def _settled(plan: Plan, delivery: Delivery, terms: job.Terms) -> frozenset[str]:
    """The shards that are there, which is all that is kept of many; KconvertError when the plan cannot be carried out."""
    needs = job.check(plan, delivery, terms)
    if terms.check_first:
        check_values(plan, needs.settled)
    return frozenset(needs.settled)


def _take_over(plan: Plan, delivery: Delivery) -> None:
    """Let a directory whose SRC was mended meanwhile be that of this plan, as a run without ranks does; see finished_shards."""
    head = head_at(delivery.directory)
    if delivery.store is None and head and not belongs(head, plan):
        with Journal(delivery.directory, plan, overwrite=False):
            pass


def _tasks(plan: Plan, slots: int) -> int:
    """How many ranks there are to be, of a conversion that nobody has begun."""
    worthwhile = min(ROUNDS * slots, plan.output_bytes // TASK)
    return max(min(len(plan.shards), max(slots, worthwhile)), 1)


def _numbers(plan: Plan, settled: Collection[str], count: int) -> list[int]:
    """The ranks that have something to do; the first leaves the small files."""
    ranks = deal(plan.sizes, count)
    late = (rank for rank, shard in zip(ranks, plan.shards, strict=True) if shard.name not in settled)
    return sorted({0, *late})


@contextmanager
def _alone(delivery: Delivery) -> Iterator[Path]:
    """DST/.kconvert, held against other drivers, and against runs without ranks; of a DST in a store only those here know."""
    state = delivery.directory / STATE_DIR
    busy = f"another kconvert is writing to {delivery}; wait for it, or choose another directory"
    try:
        with hold(state / LOCK, busy, shared=True), hold(state / RANKS / LOCK, busy):
            yield state
    except OSError as error:
        raise explain_os_error(error, f"cannot write to {delivery}") from None


def _links(allowed: bool) -> AbstractContextManager[None]:
    return links_allowed() if allowed else nullcontext()
