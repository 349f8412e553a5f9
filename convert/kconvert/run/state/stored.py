"""The state of a DST in an object store, in objects below DST/.kconvert, so that any machine can go on with it.

`plan.json` is the outline of the plan (see state.outline) and `ranks.json` says how many ranks there are; both are made only
where there is none yet, so of two runs one makes them and the other finds them. A shard is finished when an object
`done/SHARD/DIGEST` says so, whose name is made of the plan and of the size and ETag that the store gave the shard. What broke
off has none, and what somebody replaced has another. There are no locks, which a store does not have: two runs of one plan
may do some work twice, and what they write is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, STATE_DIR, FileStat
from kconvert.checkpoint.side_files import is_stale
from kconvert.errors import KconvertError
from kconvert.planning.plan import Plan
from kconvert.run.state.finalize import Closed, refuse_missing
from kconvert.run.state.heads import Record, advice, belongs, check_head, head_of, is_mended
from kconvert.run.state.journal import MADE_OF, UPLOAD, check_count
from kconvert.run.state.outline import CLOSING, OUTLINE, Outline
from kconvert.run.state.ranks import Rank
from kconvert.stores.urls import StoreUrl
from kconvert.stores.writing import Objects

STATE = f"{STATE_DIR}/"
PLAN = f"{STATE}{OUTLINE}"
RANKS = f"{STATE}ranks.json"
DONE = f"{STATE}done/"
SMALL = f"{STATE}{CLOSING}/"
OTHER = "another DST"  # what advice names
LOOKS = 16  # at shards' headers, at a time


@dataclass(frozen=True)
class Sight:
    """What is in DST at one moment."""

    place: StoreUrl
    files: Mapping[str, FileStat]
    outline: Outline | None
    ranks: int | None

    @classmethod
    def of(cls, objects: Objects) -> Sight:
        files = objects.listed()
        text = objects.read(PLAN) if PLAN in files else None
        outline = _parse(objects.place, text) if text is not None else None
        return cls(objects.place, files, outline, _count(objects) if RANKS in files else None)

    def is_done(self, shard: str, head: Mapping[str, Any]) -> bool:
        """Whether the shard is there as a run with this head left it."""
        return shard in self.files and _mark(head, shard, self.files[shard]) in self.files

    def missing(self, outline: Outline) -> list[str]:
        """The shards that are not there, or not as they were left."""
        sizes = {name: nbytes for name, nbytes, *_ in outline.shards}
        whole = {name for name in sizes if self.is_done(name, outline.head) and self.files[name].nbytes == sizes[name]}
        return [name for name in sizes if name not in whole]

    def is_closed(self, outline: Outline) -> bool:
        """Whether nothing is left to do."""
        return self.files.keys() >= set(outline.small) and not self.missing(outline)

    def is_closable(self, outline: Outline) -> bool:
        """Whether rank 0 has left the small files."""
        return all(f"{SMALL}{name}" in self.files for name in outline.small)

    @property
    def content(self) -> list[str]:
        """What is no state."""
        return [name for name in self.files if not name.startswith(STATE)]


class Stored:
    """A DST in an object store, for one plan."""

    def __init__(self, place: StoreUrl, plan: Plan) -> None:
        self.place, self._plan, self._objects = place, plan, Objects(place)
        self._head = head_of(plan, "")

    @cached_property
    def _sight(self) -> Sight:
        """What was there when this was first asked for something: a large DST has a long list."""
        return Sight.of(self._objects)

    def finished(self, overwrite: bool, rank: Rank | None) -> dict[str, Record]:
        """Records of the shards that are there. KconvertError when DST holds anything else; only looks."""
        sight = self._sight
        outline = sight.outline
        if outline is None or (overwrite and not belongs(outline.head, self._plan)):
            if (content := sight.content) and not overwrite:
                raise KconvertError(f"{self.place} is not empty ({min(content)}); {advice(rank, OTHER)}")
            return {}
        if rank is None and self._sound is not None:
            return {name: self._record(name) for name in self._sound}
        self._check_plan(outline, rank)
        _check_rank(sight.ranks, rank, self.place)
        return {s.name: self._record(s.name) for s in self._plan.shards if sight.is_done(s.name, outline.head)}

    def published(self) -> dict[str, Record]:
        """The same of all shards when nothing is left to do; else none."""
        sight = self._sight
        if sight.outline is None or not belongs(sight.outline.head, self._plan) or not sight.is_closed(sight.outline):
            return {}
        return {shard.name: self._record(shard.name) for shard in self._plan.shards}

    @property
    def has_small_files(self) -> bool:
        """Whether rank 0 has left them."""
        sight = self._sight
        return sight.outline is not None and sight.is_closable(sight.outline)

    def begin(self, overwrite: bool, rank: Rank | None, command: str, complete: bool) -> None:
        """Make the plan known, after clearing away what says that DST is finished, when it is not `complete`; see Journal."""
        sight = self._sight
        mine = sight.outline is not None and belongs(sight.outline.head, self._plan)
        if not complete or not mine:
            marks = {CONFIG_NAME, INDEX_NAME, *self._plan.texts}
            self._objects.delete(marks & sight.files.keys())
        if overwrite:
            self._objects.delete(self._stale(sight, mine))
        elif rank is None:
            self._take_over(command)
        if rank is None:
            self._objects.delete([name for name in (RANKS,) if name in sight.files])
        self._introduce(rank, command)
        if rank is not None:
            self._join(rank)

    def share(self, count: int, command: str) -> int:
        """Make the plan known to ranks, so many unless others began before; returns how many they are."""
        self._take_over(command)
        self._introduce(Rank(0, count), command)
        self._objects.create(RANKS, _ranks(count))
        return _count(self._objects) or count

    @cached_property
    def _sound(self) -> list[str] | None:
        """The shards that are as good as they were, where files of the source were replaced since this plan was begun; None
        where none was, or DST is finished. See finished_shards."""
        sight = self._sight
        if sight.outline is None or CONFIG_NAME in sight.files or not is_mended(sight.outline.head, self._plan):
            return None
        head = sight.outline.head
        done = {shard.name for shard in self._plan.shards if sight.is_done(shard.name, head)}

        def is_sound(shard: str) -> bool:
            said = self._objects.read(_mark(head, shard, sight.files[shard])) or b""
            return said == self._said(shard, sight.files[shard])

        with ThreadPoolExecutor(LOOKS) as pool:
            return [name for name, sound in zip(done, pool.map(is_sound, done), strict=True) if sound]

    def _take_over(self, command: str) -> None:
        """Let DST be that of the source as it is now, with what is as good as it was."""
        if self._sound is None:
            return
        for shard in self._sound:
            self._note(shard, self._sight.files[shard])
        self._objects.put(PLAN, Outline.of(self._plan, head_of(self._plan, command), 1).text.encode())

    def _introduce(self, rank: Rank | None, command: str) -> None:
        outline = Outline.of(self._plan, head_of(self._plan, command), rank.count if rank else 1)
        if not self._objects.create(PLAN, outline.text.encode()):
            text = self._objects.read(PLAN)
            self._check_plan(_parse(self.place, text or b""), rank)

    def _stale(self, sight: Sight, mine: bool) -> Collection[str]:
        """What a run that may overwrite removes: what would pass for a part of the new checkpoint, and another plan's state."""
        kept = {shard.name for shard in self._plan.shards} if mine else set()
        stale = {name for name in sight.content if is_stale(name) and name not in kept}
        return stale if mine else stale | {name for name in sight.files if name.startswith(STATE)}

    def _join(self, rank: Rank) -> None:
        if not self._objects.create(RANKS, _ranks(rank.count)):
            _check_rank(_count(self._objects), rank, self.place)
        if rank.index == 0:
            self._put_small_files(SMALL)

    def _check_plan(self, outline: Outline, rank: Rank | None) -> None:
        if not belongs(outline.head, self._plan):
            check_head(self.place, outline.head, self._plan, rank, CONFIG_NAME not in self._sight.files, OTHER)

    def has(self, upload: Mapping[str, Any]) -> bool:
        """Whether a journal's record says that the content is here."""
        return upload.get("store") == str(self.place)

    def send(self, name: str, path: Path) -> Record:
        """Send a shard, and note that it is here."""
        stat = self._objects.put(name, path)
        self._note(name, stat)
        return dict(self._record(name)[UPLOAD])

    def _note(self, shard: str, stat: FileStat) -> None:
        """Let everybody know that a shard is finished."""
        self._objects.create(_mark(self._head, shard, stat), self._said(shard, stat))

    def _said(self, shard: str, stat: FileStat) -> bytes:
        """What is to be known of a finished shard."""
        return json.dumps({"bytes": stat.nbytes, MADE_OF: self._plan.stamp_of(shard)}).encode()

    def close(self) -> None:
        """Complete a DST whose shards are all there: side files, then config.json and the index."""
        sight = Sight.of(self._objects)
        if sight.outline is None:
            raise KconvertError(
                f"{self.place} has lost {PLAN}; run the same command again when nobody else writes there"
            )
        self._check_plan(sight.outline, None)
        if missing := sight.missing(sight.outline):
            raise KconvertError(f"{missing[0]} is not in {self.place} any more; run the same command again")
        self._put_small_files("")
        _clear(self._objects, sight)

    def _put_small_files(self, folder: str) -> None:
        for name in self._plan.side_files:
            assert self._plan.source is not None
            self._objects.put(f"{folder}{name}", self._plan.source.side_file(name))
        for name, text in self._plan.texts.items():
            self._objects.put(f"{folder}{name}", bytes(text))

    def _record(self, shard: str) -> Record:
        return {UPLOAD: {"store": str(self.place)}}


def finalize_stored(place: StoreUrl) -> Closed:
    """Close a DST in a store to which ranks have written, after a look at each shard; see kconvert.finalize."""
    objects = Objects(place)
    sight = Sight.of(objects)
    outline = _outline_of_ranks(sight)
    if sight.is_closed(outline):
        _clear(objects, sight)
        return _closed(outline, before=True)
    if sight.ranks is None:
        raise KconvertError(f"{place} is unfinished, and not by ranks; run the command again that began it")
    if missing := sight.missing(outline):
        refuse_missing(place, outline, sight.ranks, missing)
    return _close(objects, sight, outline, sight.ranks)


def finalize_complete_stored(place: StoreUrl) -> Closed | None:
    """The same where no rank has anything left to do; None where one has, who will do this in its turn."""
    objects = Objects(place)
    sight = Sight.of(objects)
    outline = _outline_of_ranks(sight)
    if sight.ranks is None or sight.missing(outline):
        return None
    return _close(objects, sight, outline, sight.ranks)


def is_closed_stored(place: StoreUrl) -> bool:
    """Whether ranks have nothing more to do with DST."""
    sight = Sight.of(Objects(place))
    return sight.outline is not None and sight.is_closed(sight.outline)


def head_in(place: StoreUrl) -> Mapping[str, Any]:
    """What the run that began in DST said of itself; nothing where none did."""
    text = Objects(place).read(PLAN)
    return {} if text is None else _parse(place, text).head


def _parse(place: StoreUrl, text: bytes) -> Outline:
    outline = Outline.parse(text)
    if outline is None:
        raise KconvertError(f"{place}/{PLAN} is not what kconvert wrote; start again with another DST")
    return outline


def _close(objects: Objects, sight: Sight, outline: Outline, ranks: int) -> Closed:
    if not sight.is_closable(outline):
        raise KconvertError(
            f"{sight.place} lacks its side files and config.json, which rank 0 of {ranks} leaves; run that rank again"
        )

    def look(shard: tuple[str, int, int, str]) -> None:
        name, _, nbytes, digest = shard
        header = objects.read(name, nbytes) or b""
        if hashlib.sha256(header).hexdigest() != digest:
            raise KconvertError(
                f"{sight.place}/{name} does not begin as it was planned; delete it, and run its rank again"
            )

    with ThreadPoolExecutor(LOOKS) as pool:
        for _ in pool.map(look, outline.shards):
            pass
    try:
        for name in outline.small:
            objects.copy(f"{SMALL}{name}", name)
    except KconvertError:
        if not Sight.of(objects).is_closed(outline):  # else another has done the same, and cleared away what he copied
            raise
    _clear(objects, sight)
    return _closed(outline)


def _closed(outline: Outline, before: bool = False) -> Closed:
    return Closed(len(outline.shards), sum(nbytes for _, nbytes, *_ in outline.shards), before)


def _clear(objects: Objects, sight: Sight) -> None:
    """Remove what only an unfinished DST needs; what says that shards are finished stays, for the same command to find."""
    objects.delete([name for name in sight.files if name == RANKS or name.startswith(SMALL)])


def _outline_of_ranks(sight: Sight) -> Outline:
    if sight.outline is None:
        raise KconvertError(f"{sight.place} is no DST that ranks have written to; give the DST of their commands")
    return sight.outline


def _ranks(count: int) -> bytes:
    return json.dumps({"ranks": count}).encode()


def _count(objects: Objects) -> int | None:
    """How many ranks there are."""
    try:
        return int(json.loads(objects.read(RANKS) or b"null")["ranks"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _check_rank(ranks: int | None, rank: Rank | None, place: StoreUrl) -> None:
    if ranks is not None and rank is not None:
        check_count(ranks, rank, place)


def _mark(head: Mapping[str, Any], shard: str, stat: FileStat) -> str:
    """The object that says that a shard is finished, as the store has it with this size and ETag."""
    tag = stat.stamp.removeprefix("etag:").removeprefix("W/").strip('"')
    said = json.dumps([head.get("plan"), head.get("source"), shard, stat.nbytes, tag])
    return f"{DONE}{shard}/{hashlib.sha256(said.encode()).hexdigest()[:32]}"
