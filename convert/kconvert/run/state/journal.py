"""The state of one run in DST/.kconvert: a lock, unfinished files, and a record of every finished shard.

The journal is a line of JSON for the plan it belongs to and one for each shard, appended once the shard is durable. A
record holds what the file looked like then, so that a rerun trusts a shard only if nobody has touched it since. A shard
that was sent to the Hub has a second line, and is finished even if the file is gone.

Ranks share the lock of DST, and each has all three in a folder of its own, see state.outline. What any of them has finished
is finished for all; a run without ranks, which is alone, takes their records over and goes on from there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from kconvert.checkpoint.files import exists, write_file
from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, RANKS, STATE_DIR
from kconvert.checkpoint.side_files import DECLARATION, why_left_out
from kconvert.errors import KconvertError, counted, explain_os_error
from kconvert.hub.ids import HubId
from kconvert.planning.plan import Plan
from kconvert.run.state.heads import (
    JOURNAL,
    Record,
    advice,
    belongs,
    check_head,
    head_of,
    heads_of,
    is_mended,
    read_lines,
)
from kconvert.run.state.locks import LOCK, hold
from kconvert.run.state.outline import OUTLINE, Outline, folder
from kconvert.run.state.ranks import Rank

PARTS = "*.part"  # unfinished files
MERGE = "merge"  # of a patch that is being merged, see state.merge
MADE_OF = "made_of"  # of a record: which source files
UPLOAD = "upload"  # of a record: where else the content is
STAGED = "source"  # source files on their way through the disk
SHARDS = ("*.safetensors", "*.gguf", "_layer_*/_numa_*/*.kt")  # the last of AMX weights


class Journal:
    """Hold of a DST for one plan, a context manager. `finished` has the records of shards that need no more work.

    Without a `rank` it is alone; ranks, of which none may have the same number, share DST. `command` is what the user typed, to
    be told later. On the way to an object store, `sent` has the records of what is there, and `shares` are the shards that are
    made here.
    """

    def __init__(
        self,
        destination: Path,
        plan: Plan,
        overwrite: bool,
        push: HubId | None = None,
        command: str = "",
        rank: Rank | None = None,
        sent: Mapping[str, Record] | None = None,
        shares: frozenset[str] | None = None,
    ) -> None:
        self.destination, self.rank, self._plan = destination, rank, plan
        self._made = not exists(destination)
        self._passes = sent is not None
        self._root = destination / STATE_DIR
        self._state = self._root if rank is None else folder(self._root, rank.index)
        self._token = secrets.token_hex(4)  # where locks fail, two runs still do not write one file
        self._lock = threading.Lock()
        try:
            with ExitStack() as held:
                busy = f"another kconvert is writing to {destination}; wait for it, or choose another directory"
                held.enter_context(hold(self._root / LOCK, busy, shared=rank is not None))
                self.finished = with_sent(finished_shards(destination, plan, overwrite, push, rank, alone=True), sent)
                if shares is None:
                    shares = frozenset(shard.name for shard in plan.shards) if rank is None else rank.share(plan)
                self.shares = shares
                if rank is not None:
                    self._join(plan, command, rank)
                    busy = f"{rank} is at work on {destination} already; give each worker a number of its own"
                    held.enter_context(hold(self._state / LOCK, busy))
                self._begin(plan, overwrite, command)
                self._held = held.pop_all()
        except OSError as error:
            raise explain_os_error(error, f"cannot write to {destination}") from None

    @property
    def todo(self) -> frozenset[str]:
        """The shards that whoever holds the journal still has to write."""
        return self.shares - self.finished.keys()

    def _join(self, plan: Plan, command: str, rank: Rank) -> None:
        """Be one of the ranks at work, the first if there are none. KconvertError where they are others."""
        outline = Outline.read(self._root)
        if outline is None:
            outline = Outline.of(plan, head_of(plan, command), rank.count).put(self._root, self._token)
        check_head(self.destination, outline.head, plan, rank, is_open=True)
        _check_count(outline, rank, self.destination)

    def _begin(self, plan: Plan, overwrite: bool, command: str) -> None:
        """Clear away what is stale, the marks of a finished checkpoint first, and write down what is not."""
        heads = [head for head in heads_of(self._root, Outline.read(self._root)) if belongs(head, plan)]
        # Who goes on names the commit that he found here; what was asked for at first must stay.
        head = heads[0] if heads else head_of(plan, command)
        mine = sorted(self.finished.keys() & self.shares)
        lines = [head, *({"shard": shard, **self.finished[shard]} for shard in mine)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if not heads:
            shutil.rmtree(self.staged, ignore_errors=True)
        if self.todo:
            shutil.rmtree(self._root / MERGE, ignore_errors=True)
            for name in {CONFIG_NAME, INDEX_NAME, *plan.texts}:
                (self.destination / name).unlink(missing_ok=True)
        for path in self._stale(overwrite):
            path.unlink(missing_ok=True)
        write_file(self._state / JOURNAL, self.partial(JOURNAL), text.encode())
        if self.rank is None:
            disband(self._root)

    def _stale(self, overwrite: bool) -> list[Path]:
        """Of a rank its own unfinished files, and those of a run without, as there is none now; see stale_files."""
        if self.rank is None:
            return stale_files(self.destination, self.finished, overwrite)
        return [*self._root.glob(PARTS), *self._state.glob(PARTS)]

    def partial(self, name: str) -> Path:
        """Where the file called `name` lies until it is complete."""
        short = os.fsencode(name.replace("/", "__"))[-200:]  # a name has 255 bytes at most
        return self._state / (self._token + "-" + short.decode("utf-8", "ignore") + ".part")

    @property
    def staged(self) -> Path:
        """The directory of source files that are here for a while."""
        return self._state / STAGED

    def record(self, shard: str) -> None:
        """Note that `shard` is complete, durable and under its name; KconvertError where its source has changed meanwhile."""
        if self._plan.source is not None:
            self._plan.source.check_same(self._plan.files_of(shard))
        try:
            self._append(shard, {**_looks(self.destination / shard), MADE_OF: self._plan.stamp_of(shard)})
        except OSError as error:
            raise explain_os_error(error, f"cannot read {self.destination / shard}") from None

    def note(self, shard: str, **facts: Record) -> None:
        """Add to the record of a finished shard: `upload` (where on the Hub its content is), `parity`."""
        self._append(shard, facts)

    def _append(self, shard: str, facts: Record) -> None:
        path = self._state / JOURNAL
        try:
            with self._lock, open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"shard": shard, **facts}) + "\n")
                file.flush()
                os.fsync(file.fileno())
                self.finished.setdefault(shard, {}).update(facts)
        except OSError as error:
            raise explain_os_error(error, f"cannot write {path}") from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, KconvertError):
            self._leave_nothing()
        self._held.close()

    def _leave_nothing(self) -> None:
        """Remove what a run has left that finished nothing and has nothing lying there, in a DST that holds nothing else."""
        source = self._plan.source
        if self.finished or self.rank is not None or self._passes or (source is not None and source.directory is None):
            return  # what comes from elsewhere goes on from its commit
        with suppress(OSError):
            names = {path.name for path in self._root.iterdir()}
            if names <= {JOURNAL, LOCK} and [path.name for path in self.destination.iterdir()] == [STATE_DIR]:
                shutil.rmtree(self._root)
                if self._made:
                    self.destination.rmdir()


def finished_shards(
    destination: Path,
    plan: Plan,
    overwrite: bool,
    push: HubId | None = None,
    rank: Rank | None = None,
    alone: bool = False,
) -> dict[str, Record]:
    """The records of the shards that earlier runs of this plan, or other ranks, finished and nobody has touched since.

    Where some of the source's files were replaced since, as a damaged one is by a sound one, those shards count that others
    were made of; but not for a rank, nor once the output is complete. Of a rank `alone`, what others of its count have finished
    is not looked for: that is none of its shards. Those that were sent to the Hub, to `push`, need not be there any more. Only
    looks, writes nothing. KconvertError when DST holds anything else, unless the user said to `overwrite` it; and when it is
    that of more ranks or fewer.
    """
    if not exists(destination):
        return {}
    state = destination / STATE_DIR
    try:
        foreign, outline = None, Outline.read(state)
        if outline is None:
            # The list first: other ranks may begin now, and write their outline before all else.
            foreign = next((path.name for path in destination.iterdir() if path.name != STATE_DIR), None)
            outline = Outline.read(state)
        heads = heads_of(state, outline)
        others = [head for head in heads if not belongs(head, plan)]
        if overwrite and (others or not heads):
            return {}
        if foreign is not None and not heads:
            raise KconvertError(f"{destination} is not empty ({foreign}); {advice(rank)}")
        is_open = not exists(destination / CONFIG_NAME)
        if others and not (rank is None and is_open and is_mended(others[0], plan)):
            check_head(destination, others[0], plan, rank, is_open)
        _check_count(outline, rank, destination)
        head = others[0] if others else {"plan": plan.hash, "source": plan.stamp}
        records = read_records(state, head, rank if alone else None)
        known = {shard.name: records[shard.name] for shard in plan.shards if shard.name in records}
        if others:
            known = {name: record for name, record in known.items() if record.get(MADE_OF) == plan.stamp_of(name)}
        return {name: record for name, record in known.items() if is_done(destination / name, record, push)}
    except OSError as error:
        raise explain_os_error(error, f"cannot read {destination}") from None


def with_sent(finished: dict[str, Record], sent: Mapping[str, Record] | None) -> dict[str, Record]:
    """The records of what is finished here and in the store; who has sent what, only the store knows."""
    if sent is None:
        return finished
    here = {name: {key: value for key, value in record.items() if key != UPLOAD} for name, record in finished.items()}
    return {name: here.get(name, {}) | dict(sent.get(name, {})) for name in {**here, **sent}}


def read_records(state: Path, head: Mapping[str, Any], rank: Rank | None = None) -> dict[str, Record]:
    """What the journals in DST/.kconvert with such a head, that of DST and those of ranks or of one, have of their shards."""
    records: dict[str, Record] = {}
    for found in each_journal(state, head, rank):
        for shard, record in found.items():
            records.setdefault(shard, {}).update(record)
    return records


def each_journal(state: Path, head: Mapping[str, Any], rank: Rank | None = None) -> Iterator[dict[str, Record]]:
    """The same of each of them; of a shard that several have, what comes later goes."""
    ranks = _folders(state / RANKS) if rank is None else [str(rank.index)]
    for where in chain((state,), (state / RANKS / name for name in ranks)):
        lines, records = read_lines(where / JOURNAL), dict[str, Record]()
        if lines and all(lines[0].get(key) == head.get(key) for key in ("plan", "source")):
            for line in lines[1:]:
                records.setdefault(str(line.pop("shard", "")), {}).update(line)
            yield records


def _folders(ranks: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return sorted(os.listdir(ranks))
    return []


def _check_count(outline: Outline | None, rank: Rank | None, destination: Path) -> None:
    if outline is not None and rank is not None:
        check_count(outline.ranks, rank, destination)


def check_count(ranks: int, rank: Rank, destination: object) -> None:
    """KconvertError where a rank is none of those that share DST."""
    if ranks != rank.count:
        raise KconvertError(
            f"{destination} is shared by {counted(ranks, 'rank')}, and {rank} is none of them; go on with {ranks}, or by one "
            "run without --worker, which takes over what they have finished"
        )


def disband(state: Path) -> None:
    """Remove what ranks have left in DST/.kconvert; the outline first, without which the rest says nothing."""
    (state / RANKS / OUTLINE).unlink(missing_ok=True)
    shutil.rmtree(state / RANKS, ignore_errors=True)


def is_done(path: Path, record: Record, push: HubId | None) -> bool:
    if push is not None and record.get("upload", {}).get("repo") == push.repo:
        return True
    looks = _looks(path) if path.is_file() else {}
    return bool(looks) and looks == {key: record.get(key) for key in looks}


def stale_files(destination: Path, finished: Collection[str], overwrite: bool) -> list[Path]:
    """What a killed run left unfinished and, on `overwrite`, the shards of the checkpoint in DST and what declares their
    quantisation; nothing else."""
    stale = [path for pattern in (PARTS, f"{RANKS}/*/{PARTS}") for path in (destination / STATE_DIR).glob(pattern)]
    if overwrite:
        shards = (path for pattern in SHARDS for path in destination.glob(pattern))
        stale += [path for path in shards if str(path.relative_to(destination)) not in finished]
        stale += [path for path in destination.glob("*") if why_left_out(path.name) == DECLARATION and path.is_file()]
    return stale


def _looks(path: Path) -> Record:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
