"""A comparison shared by the machines of a Ray cluster: each opens both sides itself, and returns what it has found.

What one share finds is what would have been found here; so the report is the same, however many there are. Of the weights
nothing passes through Ray.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

from kconvert.checkpoint.directory import are_links_allowed, links_allowed
from kconvert.cluster.ray import Cluster
from kconvert.errors import KconvertError
from kconvert.proof.parity.comparing import Advance, Compared, Comparing, Digests, Job, Outcome, fault_of, sizes_of
from kconvert.proof.processes import SHARE

ROUNDS = 8  # shares for each that is compared at a time, to even out the end
Found: TypeAlias = tuple[list[tuple[Outcome, Digests]], KconvertError | None]  # and what ended it


@dataclass(frozen=True)
class Shares:
    """The pairs in `count` shares, one behind the other: called with a number it compares one, wherever both sides are seen."""

    again: Callable[[], Job]
    expected: str  # the job's stamp
    count: int
    cores: int
    keep_going: bool
    links: bool

    def __call__(self, number: int, tell: Advance) -> Found:
        first, last = self._bounds[number : number + 2]
        job, found = replace(self._job, pairs=self._job.pairs[first:last]), []
        try:
            with Comparing(job, tell, self.cores) as comparing, closing(comparing.compared()) as compared:
                for outcome, heard in compared:
                    found.append((outcome, heard))
                    if fault_of(outcome) and not self.keep_going:
                        break
        except KconvertError as error:  # raised where those before have been told
            return found, type(error)(f"{error} (on {os.uname().nodename})")
        return found, None

    @cached_property
    def _job(self) -> Job:
        with links_allowed() if self.links else nullcontext():
            job = self.again()
        if job.stamp != self.expected:
            raise KconvertError(
                "SRC or DST is another here than on the driver's machine; they must have the same files everywhere, with the "
                "same sizes and times"
            )
        return job

    @cached_property
    def _bounds(self) -> list[int]:
        """Of the shares, by the bytes to read."""
        ends = [0, *accumulate(sum(sizes) for sizes in sizes_of(self._job.pairs))]
        inner = (bisect_left(ends, ends[-1] * number / self.count) for number in range(1, self.count))
        return [0, *inner, len(self._job.pairs)]


def compared_by_ray(
    cluster: Cluster, job: Job, again: Callable[[], Job], keep_going: bool, advance: Advance
) -> Compared:
    """See Comparing.compared; `again` makes the job elsewhere, and can be pickled."""
    worth = sum(map(sum, sizes_of(job.pairs))) // SHARE
    count = max(min(ROUNDS * cluster.slots, len(job.pairs), worth), 1)
    shares = Shares(again, job.stamp, count, cluster.cpus, keep_going, are_links_allowed())
    waiting: dict[int, Found] = {}
    wanted = 0
    with closing(cluster.call(shares, range(count), advance)) as answers:
        for number, answer in answers:
            waiting[number] = answer
            while wanted in waiting:
                found, error = waiting.pop(wanted)
                yield from found
                if error is not None:
                    raise error
                wanted += 1
