"""What the user of one rank wants to know: its share of a plan, and what it has made of that."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kconvert.errors import counted, human
from kconvert.planning.plan import Plan
from kconvert.report.counts import exactness, inexact_facts
from kconvert.report.summary import Summary
from kconvert.run.delivery import Delivery
from kconvert.run.job import is_closed
from kconvert.run.state.ranks import Rank


@dataclass(frozen=True)
class Share:
    """The shards of a rank, `nbytes` in all."""

    rank: Rank
    shards: tuple[str, ...]
    nbytes: int

    @classmethod
    def of(cls, plan: Plan, rank: Rank) -> Share:
        names = rank.share(plan)
        shards = [shard for shard in plan.shards if shard.name in names]
        return cls(rank, tuple(shard.name for shard in shards), sum(shard.nbytes for shard in shards))

    def __str__(self) -> str:
        return f"{human(self.nbytes)} in {counted(len(self.shards), 'shard')}"

    def describe(self, plan: Summary) -> Summary:
        """`--dry-run` of a rank: the whole plan, and which shards are its own."""
        facts = {"rank": self.rank.index, "ranks": self.rank.count, "bytes": self.nbytes, "shards": list(self.shards)}
        return Summary({**plan.facts, "share": facts}, (*plan.lines, f"{self.rank}: {self}"))

    def outcome(
        self,
        plan: Plan,
        delivery: Delivery,
        seconds: float,
        inexact: Mapping[str, int],
        earlier: int,
        bound: str | None,
    ) -> Summary:
        """The closing summary of a run that began when `earlier` bytes of the share were finished already, and waited for what
        `bound` says."""
        written, peak = self.nbytes - earlier, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        closed = is_closed(delivery)
        facts: dict[str, Any] = {
            "output": str(delivery),
            "rank": self.rank.index,
            "ranks": self.rank.count,
            "bytes": self.nbytes,
            "written_bytes": written,
            "shards": len(self.shards),
            "seconds": round(seconds, 3),
            "bytes_per_second": round(written / seconds),
            "peak_memory_bytes": peak,
            "bound_by": bound,
            **inexact_facts(plan, inexact),
            "complete": closed,
        }
        speed = f"in {seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
        speed += f", bound by {bound}" if bound else ""
        lines = [f"{self.rank} had nothing left to do, {self}"]
        if written:
            lines = [f"{self.rank} wrote {human(written)} of its {self} to {delivery} {speed}"]
            lines += exactness(plan, inexact, max(earlier, 1))  # other ranks speak of theirs
        lines += [f"{delivery} is complete" if closed else f"when all ranks have ended: kconvert finalize {delivery}"]
        return Summary(facts, tuple(lines))
