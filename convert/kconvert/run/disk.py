"""What a run takes of the disks and of the network, known from the plan and from what is there already; and whose paths they
are."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kconvert.checkpoint.download import Fetch
from kconvert.checkpoint.files import exists
from kconvert.checkpoint.listing import STATE_DIR
from kconvert.checkpoint.remote import RemoteCheckpoint
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import KconvertError, human
from kconvert.planning.plan import Plan
from kconvert.run.budget import Schedule, make_schedule
from kconvert.run.delivery import Delivery
from kconvert.run.fetches import places_of, plan_fetches
from kconvert.run.state.heads import Record
from kconvert.run.state.journal import STAGED, stale_files
from kconvert.run.state.outline import folder
from kconvert.run.state.ranks import Rank
from kconvert.stores.urls import StoreUrl, parse_store_url

CACHE = "choose another disk by XDG_CACHE_HOME, through which shards pass, or give a smaller --shard-size"
PARTIAL = ".incomplete"  # ends the name of a file that is being fetched


@dataclass(frozen=True)
class Needs:
    """`budget` is what may be used at the output's disk, None when what comes from the Hub is kept in its cache.

    `others` are shards that other ranks write, `staged` is where what passes through the output's disk lies. `places` says
    where each source file that comes from the Hub will lie, `missing` how many bytes of it are still to come, `present` which
    of those that pass through the output's directory an earlier run has left there, whole or in part.
    """

    plan: Plan
    delivery: Delivery
    finished: Mapping[str, Record]
    others: Collection[str]
    fetches: Mapping[str, Fetch]
    places: Mapping[str, Path]
    missing: Mapping[str, int]
    present: Collection[str]
    schedule: Schedule
    asked: int | None
    budget: int | None
    staged: Path

    @property
    def settled(self) -> Collection[str]:
        """The shards that this run does not write."""
        return self.finished.keys() | self.others

    @property
    def todo(self) -> frozenset[str]:
        """The shards that it writes."""
        return frozenset(shard.name for shard in self.plan.shards) - self.finished.keys() - frozenset(self.others)

    @property
    def download_bytes(self) -> int:
        return sum(self.missing.values())

    @property
    def leaving(self) -> bool:
        """Whether finished shards leave the disk once they are sent."""
        return self.delivery.leads_on and self.budget is not None

    def clear_staged(self) -> None:
        """Remove what an earlier run has left there and this one does not need, or has no room for yet."""
        keep = {self.places[file] for file in self.present}
        for path in self.staged.rglob("*"):
            if path.is_file() and not {path, path.with_name(path.name.removesuffix(PARTIAL))} & keep:
                path.unlink()

    def check(self, overwrite: bool) -> None:
        """KconvertError when the budget or a disk is too small."""
        self.schedule.check(self.asked)
        directory = self.delivery.directory
        stale = sum(map(disk_bytes, stale_files(directory, self.finished, overwrite)))
        if self.budget is not None:
            wanted = Counter({directory: self.schedule.peak - self._present() - stale})
        else:
            done = sum(shard.nbytes for shard in self.plan.shards if shard.name in self.finished)
            wanted = Counter({directory: self.plan.output_bytes - done - stale})
            for file, nbytes in self.missing.items():
                wanted[self.places[file].parent] += nbytes
        _check_free(wanted, CACHE if self.delivery.store is not None else "choose another disk")

    def _present(self) -> int:
        """What the run will use of the disk, and uses already."""
        mine = self.finished.keys() - set(self.others)
        shards = (self.delivery.directory / shard.name for shard in self.plan.shards if shard.name in mine)
        return sum(map(disk_bytes, [*shards, *(path for path in self.staged.rglob("*") if path.is_file())]))

    @property
    def room(self) -> int | None:
        """The budget, or what there is of it."""
        if self.budget is None:
            return None
        return min(self.budget, max(free_bytes(self.delivery.directory) + self._present(), self.schedule.peak))


def survey(
    plan: Plan,
    delivery: Delivery,
    finished: Mapping[str, Record],
    budget: int | None,
    rank: Rank | None = None,
) -> Needs:
    """What is needed to finish `plan`, or the share of a rank.

    Who sends everything on, and keeps nothing, has all the disk as a budget.
    """
    asked = budget
    if budget is None and delivery.passing:
        budget = free_bytes(delivery.directory)
    others: Collection[str] = frozenset()
    if rank is not None:
        share = rank.share(plan)
        plan, others = plan.only(share), {shard.name for shard in plan.shards} - share
    staged = _state(delivery, rank) / STAGED
    fetches = plan_fetches(plan)
    places = places_of(plan, fetches, staged, passing=budget is not None)
    arriving = {file: fetches[file].nbytes if path.is_relative_to(staged) else 0 for file, path in places.items()}
    leaving = delivery.leads_on and budget is not None
    gone = {name for name in finished if not (delivery.directory / name).exists()} if leaving else None
    present = {file for file, path in places.items() if path.is_relative_to(staged) and _there(path)}
    settled = finished.keys() | others
    schedule = make_schedule(plan, settled, arriving, present, gone, others)
    if budget is not None and present and schedule.peak > budget:
        present = set()
        schedule = make_schedule(plan, settled, arriving, present, gone, others)
    needed = {name for (kind, name) in (span.key for span in schedule.spans) if kind == "source"}
    missing = {file: max(0, fetches[file].nbytes - _there(places[file])) for file in fetches if file in needed}
    return Needs(
        plan, delivery, finished, others, fetches, places, missing, present & needed, schedule, asked, budget, staged
    )


def _state(delivery: Delivery, rank: Rank | None) -> Path:
    """Where a run has what is its own."""
    state = delivery.directory / STATE_DIR
    return state if rank is None or delivery.store is not None else folder(state, rank.index)


def check_paths(source: Path, destination: Path) -> None:
    """KconvertError when writing `destination` could touch `source`."""
    source, destination = (Path(os.path.realpath(path)) for path in (source, destination))
    if source == destination:
        raise KconvertError(f"SRC and DST are both {source}; choose another directory for the output")
    if destination.is_relative_to(source):
        raise KconvertError(f"{destination} lies inside SRC; choose a directory outside {source}")
    if source.is_relative_to(destination):
        raise KconvertError(f"SRC lies inside {destination}; choose another directory for the output")


def check_places(source: Checkpoint | None, destination: StoreUrl) -> None:
    """The same of places in object stores."""
    place = parse_store_url(source.name) if isinstance(source, RemoteCheckpoint) else None
    if place is not None and place.overlaps(destination):
        raise KconvertError(f"SRC is {place}, and DST {destination}; choose another place for the output, beside SRC")


def check_side_files(source: Path, names: Iterable[str]) -> None:
    """KconvertError for the first side file that one may not read: they are copied last, and that is hours away."""
    for name in names:
        if not os.access(source / name, os.R_OK):
            raise KconvertError(f"cannot read {source / name}, which goes along into the output; check the permissions")


def unfinished(path: Path) -> Path:
    """What a file is called while it is being fetched."""
    return path.with_name(path.name + PARTIAL)


def _there(path: Path) -> int:
    """Bytes of a file, or of its unfinished form."""
    return max(disk_bytes(path), disk_bytes(unfinished(path)))


def _check_free(wanted: Mapping[Path, int], another: str) -> None:
    """KconvertError when a disk has less than is wanted below these directories together; `another` is how to have more."""
    disks: dict[int, list[Path]] = {}
    for directory in wanted:
        disks.setdefault(existing(directory).stat().st_dev, []).append(directory)
    for directories in disks.values():
        needed, free = sum(wanted[directory] for directory in directories), free_bytes(directories[0])
        if needed > free:
            verb = "needs" if len(directories) == 1 else "need"
            raise KconvertError(
                f"{' and '.join(map(str, directories))} {verb} {human(needed)} more, but the disk has {human(free)} free; free "
                f"some space or {another}"
            )


def existing(directory: Path) -> Path:
    """The directory, or the nearest above it that exists."""
    directory = directory.absolute()
    while not exists(directory):
        directory = directory.parent
    return directory


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(existing(directory)).free


def disk_bytes(path: Path) -> int:
    """What a file takes; 0 for one that is gone: another run may just have finished it."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
