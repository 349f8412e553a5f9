"""The state of one run in DST/.kconvert: a lock, unfinished files, and a record of every finished shard.

The journal is a line of JSON for the plan it belongs to and one for each shard, appended once the shard is durable. A
record holds what the file looked like then, so that a rerun trusts a shard only if nobody has touched it since.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import kconvert
from kconvert.checkpoint.source import CONFIG_NAME, INDEX_NAME, STATE_DIR
from kconvert.errors import KconvertError, explain_os_error
from kconvert.files import write_file
from kconvert.plan import Plan

JOURNAL = "journal.jsonl"
SHARDS = ("*.safetensors", "_layer_*/_numa_*/*.kt")  # the latter of AMX weights


class Journal:
    """Exclusive hold of a DST for one plan; a context manager. `finished` names the shards that need no more work."""

    def __init__(self, destination: Path, plan: Plan, overwrite: bool) -> None:
        self.destination = destination
        self._state = destination / STATE_DIR
        self._lock = threading.Lock()
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            self._held = self._take_lock()
            try:
                self.finished = finished_shards(destination, plan, overwrite)
                self._begin(plan, overwrite)
            except BaseException:
                os.close(self._held)
                raise
        except OSError as error:
            raise explain_os_error(error, f"cannot write to {destination}") from None

    def _begin(self, plan: Plan, overwrite: bool) -> None:
        """Clear away what is stale, the marks of a finished checkpoint first, and write down what is not."""
        if len(self.finished) < len(plan.shards):
            for name in {CONFIG_NAME, INDEX_NAME, *plan.texts}:
                (self.destination / name).unlink(missing_ok=True)
        for path in stale_files(self.destination, self.finished, overwrite):
            path.unlink(missing_ok=True)
        lines = [_head(plan), *(self._record_of(shard) for shard in sorted(self.finished))]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_file(self._state / JOURNAL, self.partial(JOURNAL), text.encode())

    def partial(self, name: str) -> Path:
        """Where the file called `name` lies until it is complete."""
        return self._state / (name.replace("/", "__") + ".part")

    def record(self, shard: str) -> None:
        """Note that `shard` is complete, durable and under its name."""
        path = self._state / JOURNAL
        try:
            with self._lock, open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self._record_of(shard)) + "\n")
                file.flush()
                os.fsync(file.fileno())
                self.finished.add(shard)
        except OSError as error:
            raise explain_os_error(error, f"cannot write {path}") from None

    def _record_of(self, shard: str) -> dict[str, object]:
        return {"shard": shard, **_looks(self.destination / shard)}

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


def finished_shards(destination: Path, plan: Plan, overwrite: bool) -> set[str]:
    """The shards that an earlier run of this plan finished and nobody has touched since; only looks, writes nothing.

    KconvertError when DST holds anything else, unless the user said to `overwrite` it.
    """
    if not destination.exists():
        return set()
    advice = "choose another directory, or --overwrite to replace the checkpoint in it"
    try:
        lines = _read_lines(destination / STATE_DIR / JOURNAL)
        mine = bool(lines) and _belongs(lines[0], plan)
        if overwrite and not mine:
            return set()
        if not lines:
            foreign = next((path.name for path in destination.iterdir() if path.name != STATE_DIR), None)
            if foreign is not None:
                raise KconvertError(f"{destination} is not empty ({foreign}); {advice}")
        elif not mine:
            same = lines[0].get("plan") == plan.hash
            what = "from source files that have changed since" if same else "with other settings, or of another source"
            raise KconvertError(f"{destination} holds a conversion {what}; {advice}")
        known = {shard.name for shard in plan.shards if (destination / shard.name).is_file()}
        records = {line.pop("shard", None): line for line in lines[1:]}
        return {name for name in known if records.get(name) == _looks(destination / name)}
    except OSError as error:
        raise explain_os_error(error, f"cannot read {destination}") from None


def stale_files(destination: Path, finished: set[str], overwrite: bool) -> list[Path]:
    """What a killed run left unfinished and, on `overwrite`, the shards of the checkpoint in DST; nothing else."""
    stale = list((destination / STATE_DIR).glob("*.part"))
    if overwrite:
        shards = (path for pattern in SHARDS for path in destination.glob(pattern))
        stale += [path for path in shards if str(path.relative_to(destination)) not in finished]
    return stale


def provenance(root: Path) -> dict[str, str]:
    """`version`, `recipe` and `from` of the run that wrote the checkpoint in `root`; empty without a journal that says so.

    `from` is the source's name, empty of a synthetic sample.
    """
    try:
        lines = _read_lines(root / STATE_DIR / JOURNAL)
    except OSError:
        return {}
    head = lines[0] if lines else {}
    return {key: str(head.get(key, "")) for key in ("version", "recipe", "from")} if "version" in head else {}


def _head(plan: Plan) -> dict[str, object]:
    said = {"version": kconvert.__version__, "recipe": plan.recipe, "from": plan.source.name if plan.source else ""}
    return {"plan": plan.hash, "source": plan.stamp, **said}


def _belongs(head: Mapping[str, object], plan: Plan) -> bool:
    """Whether a journal's first line is this plan's; what the source is called does not matter."""
    return (head.get("plan"), head.get("source")) == (plan.hash, plan.stamp)


def _looks(path: Path) -> dict[str, object]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_lines(path: Path) -> list[dict[str, object]]:
    """The journal's records; a last line that a crash cut short is no record."""
    lines: list[dict[str, object]] = []
    if path.exists():
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break
            lines.append(line if isinstance(line, dict) else {})
    return lines
