"""The state of one run in DST/.kconvert: a lock, unfinished files, and a record of every finished shard.

The journal is a line of JSON for the plan it belongs to and one for each shard, appended once the shard is durable. A
record holds what the file looked like then, so that a rerun trusts a shard only if nobody has touched it since. A shard
that was sent to the Hub has a second line, and is finished even if the file is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from kconvert.checkpoint.files import exists, is_directory, write_file
from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, STATE_DIR
from kconvert.checkpoint.side_files import DECLARATION, why_left_out
from kconvert.errors import KconvertError, explain_os_error
from kconvert.hub.ids import HubId, parse_hub_id
from kconvert.planning.plan import Plan
from kconvert.version import __version__

JOURNAL = "journal.jsonl"
PROVENANCE = ("version", "recipe", "from", "command")  # what a journal says of the run that began it
STAGED = "source"  # source files on their way through the disk
SHARDS = ("*.safetensors", "*.gguf", "_layer_*/_numa_*/*.kt")  # the last of AMX weights

Record: TypeAlias = dict[str, Any]


class Journal:
    """Exclusive hold of a DST for one plan; a context manager. `finished` has the records of shards that need no more work.

    `command` is what the user typed, to be told later.
    """

    def __init__(
        self, destination: Path, plan: Plan, overwrite: bool, push: HubId | None = None, command: str = ""
    ) -> None:
        self.destination = destination
        self._state = destination / STATE_DIR
        self._lock = threading.Lock()
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            self._held = self._take_lock()
            try:
                self.finished = finished_shards(destination, plan, overwrite, push)
                self._begin(plan, overwrite, command)
            except BaseException:
                os.close(self._held)
                raise
        except OSError as error:
            raise explain_os_error(error, f"cannot write to {destination}") from None

    def _begin(self, plan: Plan, overwrite: bool, command: str) -> None:
        """Clear away what is stale, the marks of a finished checkpoint first, and write down what is not."""
        before = _read_lines(self._state / JOURNAL)
        goes_on = _belongs(before, plan)
        # Who goes on names the commit that he found here; what was asked for at first must stay.
        head = before[0] if goes_on else _head(plan, command)
        lines = [head, *({"shard": shard, **self.finished[shard]} for shard in sorted(self.finished))]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if not goes_on:
            shutil.rmtree(self.staged, ignore_errors=True)
        if len(self.finished) < len(plan.shards):
            for name in {CONFIG_NAME, INDEX_NAME, *plan.texts}:
                (self.destination / name).unlink(missing_ok=True)
        for path in stale_files(self.destination, self.finished, overwrite):
            path.unlink(missing_ok=True)
        write_file(self._state / JOURNAL, self.partial(JOURNAL), text.encode())

    def partial(self, name: str) -> Path:
        """Where the file called `name` lies until it is complete."""
        short = os.fsencode(name.replace("/", "__"))[-200:]  # a name has 255 bytes at most
        return self._state / (short.decode("utf-8", "ignore") + ".part")

    @property
    def staged(self) -> Path:
        """The directory of source files that are here for a while."""
        return self._state / STAGED

    def record(self, shard: str) -> None:
        """Note that `shard` is complete, durable and under its name."""
        try:
            self._append(shard, _looks(self.destination / shard))
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

    def _take_lock(self) -> int:
        held = os.open(self._state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise KconvertError(
                f"another kconvert is writing to {self.destination}; wait for it, or choose another directory"
            ) from None
        return held

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._held)


def finished_shards(destination: Path, plan: Plan, overwrite: bool, push: HubId | None = None) -> dict[str, Record]:
    """The records of the shards that an earlier run of this plan finished and nobody has touched since.

    Those that it sent to the Hub, to `push`, need not be there any more. Only looks, writes nothing. KconvertError when DST
    holds anything else, unless the user said to `overwrite` it.
    """
    if not exists(destination):
        return {}
    advice = "choose another directory, or --overwrite to replace the checkpoint in it"
    try:
        lines = _read_lines(destination / STATE_DIR / JOURNAL)
        if overwrite and not _belongs(lines, plan):
            return {}
        if not lines:
            foreign = next((path.name for path in destination.iterdir() if path.name != STATE_DIR), None)
            if foreign is not None:
                raise KconvertError(f"{destination} is not empty ({foreign}); {advice}")
        elif not _belongs(lines, plan):
            same = lines[0].get("plan") == plan.hash
            what = "from source files that have changed since" if same else "with other settings, or of another source"
            raise KconvertError(f"{destination} holds a conversion {what}; {advice}")
        records: dict[str, Record] = {}
        for line in lines[1:]:
            records.setdefault(str(line.pop("shard", "")), {}).update(line)
        known = {shard.name: records[shard.name] for shard in plan.shards if shard.name in records}
        return {name: record for name, record in known.items() if _is_done(destination / name, record, push)}
    except OSError as error:
        raise explain_os_error(error, f"cannot read {destination}") from None


def _is_done(path: Path, record: Record, push: HubId | None) -> bool:
    if push is not None and record.get("upload", {}).get("repo") == push.repo:
        return True
    looks = _looks(path) if path.is_file() else {}
    return bool(looks) and looks == {key: record.get(key) for key in looks}


def pinned_commit(destination: Path, source: str, revision: str | None) -> str | None:
    """The commit of the repository `source` from which a run into `destination` was begun that asked for the same revision."""
    place = parse_hub_id(source)
    if place is None or is_directory(source):
        return None
    try:
        lines = _read_lines(destination / STATE_DIR / JOURNAL)
    except OSError:
        return None  # whoever opens the journal says so
    origin = parse_hub_id(str(lines[0].get("origin"))) if lines else None
    same = origin is not None and origin.repo == place.repo and lines[0].get("asked") == (revision or place.revision)
    return origin.revision if origin is not None and same else None


def stale_files(destination: Path, finished: Collection[str], overwrite: bool) -> list[Path]:
    """What a killed run left unfinished and, on `overwrite`, the shards of the checkpoint in DST and what declares their
    quantisation; nothing else."""
    stale = list((destination / STATE_DIR).glob("*.part"))
    if overwrite:
        shards = (path for pattern in SHARDS for path in destination.glob(pattern))
        stale += [path for path in shards if str(path.relative_to(destination)) not in finished]
        stale += [path for path in destination.glob("*") if why_left_out(path.name) == DECLARATION and path.is_file()]
    return stale


def provenance(root: Path) -> dict[str, str]:
    """`version`, `recipe`, `from` and `command` of the run that wrote the checkpoint in `root`; none without a journal.

    `from` is the source's name, empty of a synthetic sample, and `command` what was typed, empty if nothing was.
    """
    try:
        lines = _read_lines(root / STATE_DIR / JOURNAL)
    except OSError:
        return {}
    head = lines[0] if lines else {}
    return {key: str(head.get(key, "")) for key in PROVENANCE} if "version" in head else {}


def _head(plan: Plan, command: str) -> Record:
    """What a journal belongs to, and where that comes from; of a source on the Hub also the revision that was asked for."""
    said = {"version": __version__, "recipe": plan.recipe, "from": plan.source.name if plan.source else ""}
    origin = {} if plan.source is None else plan.source.origin
    return {"plan": plan.hash, "source": plan.stamp, **said, "command": command, **origin}


def _belongs(lines: list[Record], plan: Plan) -> bool:
    """Whether a journal is this plan's; what the source is called does not matter."""
    return bool(lines) and (lines[0].get("plan"), lines[0].get("source")) == (plan.hash, plan.stamp)


def _looks(path: Path) -> Record:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_lines(path: Path) -> list[Record]:
    """The journal's records; a last line that a crash cut short is no record."""
    lines: list[Record] = []
    if path.exists():
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            lines.append(line if isinstance(line, dict) else {})
    return lines
