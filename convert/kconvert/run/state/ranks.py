"""Ranks: processes, on any number of machines, that share the shards of a plan.

Each makes the plan for itself, which is the same everywhere, and by its number knows its shards; nothing else need travel.
The launcher gives the numbers: rank I of N with I from 0 to N - 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace

from kconvert.errors import KconvertError
from kconvert.planning.plan import Plan

AUTO = "auto"
LAUNCHERS = {
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "torchrun": ("RANK", "WORLD_SIZE"),
    "kubernetes": ("JOB_COMPLETION_INDEX", "JOB_COMPLETION_COUNT"),
}
MOST = 100_000  # ranks


@dataclass(frozen=True)
class Rank:
    """Number `index` of `count`, from 0 on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"rank {self.index} of {self.count}"

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str]) -> Rank:
        """From --worker: I/N, the name of a launcher whose variables say it, or `auto` for whichever launcher there is."""
        if text in LAUNCHERS:
            return _launched(text, environment)
        if text == AUTO:
            return _only(environment)
        index, slash, count = text.partition("/")
        if not slash:
            raise KconvertError(f"--worker {text} is no rank; give I/N as 0/4, or {AUTO}, {', '.join(LAUNCHERS)}")
        return _rank(f"--worker {text}", index, count)

    def share(self, plan: Plan) -> frozenset[str]:
        """The shards of this rank."""
        return frozenset(plan.shards[number].name for number in _hands(plan.sizes, self.count)[self.index])

    def nbytes(self, plan: Plan) -> int:
        """What they have together."""
        return sum(plan.sizes[number] for number in _hands(plan.sizes, self.count)[self.index])


@lru_cache(4)
def _hands(sizes: tuple[int, ...], count: int) -> list[list[int]]:
    """The numbers of the shards that each rank has."""
    hands: list[list[int]] = [[] for _ in range(count)]
    for number, rank in enumerate(deal(sizes, count)):
        hands[rank].append(number)
    return hands


def deal(sizes: Sequence[int], count: int) -> list[int]:
    """The rank of each shard: the largest first, each to the rank that has least by then.

    No rank gets more than a shard more than another. Shards of one size go round, so that ranks read neighbouring parts of
    the source at the same time.
    """
    loads = [(0, rank) for rank in range(count)]
    heapify(loads)
    ranks = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        load, ranks[number] = loads[0]
        heapreplace(loads, (load + sizes[number], ranks[number]))
    return ranks


def _launched(launcher: str, environment: Mapping[str, str]) -> Rank:
    index, count = LAUNCHERS[launcher]
    missing = [name for name in (index, count) if name not in environment]
    if missing:
        raise KconvertError(f"--worker {launcher} needs {missing[0]}, which is not set; {_help(launcher)}")
    what = f"{index}={environment[index]} with {count}={environment[count]}"
    return _rank(what, environment[index], environment[count])


def _help(launcher: str) -> str:
    return {
        "slurm": "start the command with srun",
        "torchrun": "start the command with torchrun --no-python",
        "kubernetes": "the Job's completionMode is Indexed, and its template sets JOB_COMPLETION_COUNT to its completions",
    }[launcher]


def _only(environment: Mapping[str, str]) -> Rank:
    """What all launchers say that have left their variables here."""
    there = [name for name, (index, _) in LAUNCHERS.items() if index in environment]
    if not there:
        names = ", ".join(index for index, _ in LAUNCHERS.values())
        raise KconvertError(
            f"--worker {AUTO} finds none of {names} set; start the command by its launcher, or give I/N"
        )
    ranks = {name: _launched(name, environment) for name in there}
    if len(set(ranks.values())) > 1:
        said = " and ".join(f"{name} {rank.index}/{rank.count}" for name, rank in ranks.items())
        raise KconvertError(f"--worker {AUTO} finds {said}; give --worker {' or --worker '.join(ranks)}")
    return next(iter(ranks.values()))


def _rank(what: str, index: str, count: str) -> Rank:
    if not all(re.fullmatch("[0-9]{1,9}", number) for number in (index, count)):
        raise KconvertError(f"{what} is no rank; both are whole numbers, as in 0/4")
    rank = Rank(int(index), int(count))
    if not 0 < rank.count <= MOST:
        raise KconvertError(f"{what} is no rank; there are 1 to {MOST:,}")
    if rank.index >= rank.count:
        raise KconvertError(f"{what} is no rank; the ranks of {rank.count} are 0 to {rank.count - 1}")
    return rank
