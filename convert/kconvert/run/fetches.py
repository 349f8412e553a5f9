"""What a plan reads from elsewhere: whole files, and byte ranges of those of which it needs little."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from kconvert.checkpoint.download import Fetch
from kconvert.checkpoint.remote import RemoteCheckpoint
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Step

GAP = 1 << 20  # bytes that are quicker fetched than left out
WHOLE = 0.9  # of which more than this is needed, a file is fetched whole and checked against its digest


def plan_fetches(plan: Plan) -> dict[str, Fetch]:
    """What must be fetched, whole files and ranges of others, in the order of first need."""
    if not isinstance(plan.source, RemoteCheckpoint):
        return {}
    fetches = {}
    for file, wanted in _extents(plan.steps).items():
        stat = plan.source.files[file]
        share = sum(stop - start for start, stop in wanted) / max(stat.nbytes, 1)
        fetches[file] = Fetch(file, stat, ((0, stat.nbytes),) if share > WHOLE else wanted)
    return fetches


def places_of(plan: Plan, fetches: Mapping[str, Fetch], staged: Path, passing: bool) -> dict[str, Path]:
    """Where a file is kept for good or will be, else below `staged`."""
    if not isinstance(plan.source, RemoteCheckpoint):
        return {}
    found = {}
    for file, wanted in fetches.items():
        kept = plan.source.cache(file) if wanted.is_whole and not passing else None
        found[file] = plan.source.cached(file) or kept or staged / file
    return found


def _extents(steps: Iterable[Step]) -> dict[str, tuple[tuple[int, int], ...]]:
    """For each file the byte ranges that the steps read, ascending; those with a small gap between them are one."""
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for step in steps:
        for place, nbytes in step.needs:
            ranges[place.file].append((place.start, place.start + nbytes))
    return {file: tuple(_join(sorted(found))) for file, found in ranges.items()}


def _join(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined = ranges[:1]
    for start, stop in ranges[1:]:
        if start - joined[-1][1] < GAP:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
