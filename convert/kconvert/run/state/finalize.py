"""The last act of a conversion: side files, then config.json and the index, so that an unfinished DST lacks both.

Of ranks, rank 0 leaves these files beforehand, and who closes DST needs neither SRC nor the plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from kconvert.checkpoint.files import exists, is_directory, sync_directory, write_file
from kconvert.checkpoint.listing import CONFIG_NAME, STATE_DIR
from kconvert.errors import KconvertError, counted, explain_os_error
from kconvert.planning.plan import Plan
from kconvert.run.state.heads import JOURNAL, Record, read_lines
from kconvert.run.state.journal import Journal, disband, each_journal, is_done, read_records
from kconvert.run.state.locks import LOCK, hold
from kconvert.run.state.outline import Outline, closing
from kconvert.run.state.ranks import deal


def finalize(plan: Plan, journal: Journal) -> None:
    """Complete a DST whose shards are all there; a rerun does it again with the same result."""
    missing = [shard.name for shard in plan.shards if shard.name not in journal.finished]
    if missing:
        raise KconvertError(f"{missing[0]} was not finished; run the same command again")
    leave(plan, journal, journal.destination)


def leave(plan: Plan, journal: Journal, directory: Path) -> None:
    """Write the small files of `plan` into a directory, config.json and the index last."""
    for name in plan.side_files:
        assert plan.source is not None
        _copy(plan.source.side_file(name), directory / name, journal.partial(name))
    for name, text in plan.texts.items():
        write_file(directory / name, journal.partial(name), bytes(text))


@dataclass(frozen=True)
class Closed:
    """What `finalize_ranks` found: how many shards of how many bytes, and whether DST was closed already."""

    shards: int
    nbytes: int
    before: bool = False


def finalize_ranks(destination: Path) -> Closed:
    """Close a DST whose shards ranks have written, after a look at each of them; see kconvert.finalize."""
    state = destination / STATE_DIR
    if not is_directory(state):
        raise KconvertError(f"{destination} is no directory that ranks have written to; give the DST of their commands")
    if Outline.read(state) is None:
        return _closed_before(destination)
    busy = f"kconvert is at work on {destination}; wait for it, or stop it"
    try:
        with hold(state / LOCK, busy):
            return _close(destination, state)
    except OSError as error:
        raise explain_os_error(error, f"cannot write to {destination}") from None


def finalize_complete(destination: Path) -> Closed | None:
    """The same where no rank has anything left to do; None where one has, who will do this in its turn."""
    state = destination / STATE_DIR
    if (outline := Outline.read(state)) is None or _missing(destination, state, outline):
        return None
    try:
        with hold(state / LOCK, "", wait=True):  # who has it is about to end, or does the same
            return _close(destination, state)
    except OSError as error:
        raise explain_os_error(error, f"cannot write to {destination}") from None


def is_closed(destination: Path) -> bool:
    """Whether ranks have nothing more to do with DST."""
    return Outline.read(destination / STATE_DIR) is None and exists(destination / CONFIG_NAME)


def _close(destination: Path, state: Path) -> Closed:
    if (outline := Outline.read(state)) is None:
        return _closed_before(destination)
    if missing := _missing(destination, state, outline):
        refuse_missing(destination, outline, outline.ranks, missing)
    if not outline.is_closable(state):
        raise KconvertError(
            f"{destination} lacks its side files and config.json, which rank 0 of {outline.ranks} leaves; run that rank again"
        )
    for name, _, nbytes, digest in outline.shards:
        _check_header(destination / name, nbytes, digest)
    for number, name in enumerate(outline.small):
        _copy(closing(state) / name, destination / name, state / f"{number}.part")
    write_file(state / JOURNAL, state / f"{JOURNAL}.part", _joined(state, outline))
    disband(state)
    return Closed(len(outline.shards), sum(nbytes for _, nbytes, *_ in outline.shards))


def _joined(state: Path, outline: Outline) -> bytes:
    """One journal of all, made of one after the other, as of many shards there are many."""
    ours, text = {name for name, *_ in outline.shards}, bytearray(f"{json.dumps(outline.head)}\n".encode())
    for records in each_journal(state, outline.head):
        for name, record in records.items():
            if name in ours:
                text += f"{json.dumps({'shard': name, **record})}\n".encode()
    return bytes(text)


def _closed_before(destination: Path) -> Closed:
    """Of a DST in which there are no ranks, or no more."""
    if not exists(destination / CONFIG_NAME):
        raise KconvertError(f"{destination} is unfinished, and not by ranks; run the command again that began it")
    lines = read_lines(destination / STATE_DIR / JOURNAL)
    shards = read_records(destination / STATE_DIR, lines[0]) if lines else {}
    return Closed(len(shards), sum(record.get("bytes", 0) for record in shards.values()), before=True)


def _missing(destination: Path, state: Path, outline: Outline) -> list[str]:
    """The shards that are not there, or not as the rank left them that wrote them."""
    missing = {name: nbytes for name, nbytes, *_ in outline.shards}
    whole = {}
    for records in each_journal(state, outline.head):
        for name in missing.keys() & records.keys():
            whole[name] = _is_whole(destination / name, missing[name], records[name])
    return [name for name in missing if not whole.get(name)]


def _is_whole(path: Path, nbytes: int, record: Record) -> bool:
    return record.get("bytes") == nbytes and is_done(path, record, None)


def refuse_missing(destination: object, outline: Outline, ranks: int, missing: Collection[str]) -> None:
    """KconvertError that names the ranks whose shards are missing."""
    owners = deal([nbytes for _, nbytes, *_ in outline.shards], ranks)
    late = sorted({rank for rank, (name, *_) in zip(owners, outline.shards, strict=True) if name in missing})
    one, named = len(late) == 1, [*map(str, late[:8]), *(["others"] if len(late) > 8 else [])]
    listed = " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
    raise KconvertError(
        f"{destination} is not complete: {'rank' if one else 'ranks'} {listed} of {ranks} {'has' if one else 'have'} "
        f"not finished, {counted(len(missing), 'shard')} of {len(outline.shards):,} missing or changed since, the first "
        f"{next(iter(missing))}; run {'that rank' if one else 'those ranks'} again"
    )


def _check_header(path: Path, nbytes: int, digest: str) -> None:
    with open(path, "rb") as file:
        header = file.read(nbytes)
    if hashlib.sha256(header).hexdigest() != digest:
        raise KconvertError(f"{path} does not begin as it was planned; delete it, and run its rank again")


def _copy(source: Path, target: Path, partial: Path) -> None:
    """Copy a side file, following a Hub cache's symbolic link, with the mode that new files get."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(partial, target)
        sync_directory(target.parent)
    except OSError as error:
        raise explain_os_error(error, f"cannot copy {source} to {target}") from None
