"""The last act of a conversion: side files, then config.json and the index, so that an unfinished DST lacks both."""

from __future__ import annotations

import os
import shutil

from kconvert.checkpoint.files import sync_directory, write_file
from kconvert.errors import KconvertError, explain_os_error
from kconvert.planning.plan import Plan
from kconvert.run.journal import Journal


def finalize(plan: Plan, journal: Journal) -> None:
    """Complete a DST whose shards are all there; a rerun does it again with the same result."""
    missing = [shard.name for shard in plan.shards if shard.name not in journal.finished]
    if missing:
        raise KconvertError(f"{missing[0]} was not finished; run the same command again")
    for name in plan.side_files:
        _copy(plan, journal, name)
    for name, text in plan.texts.items():
        write_file(journal.destination / name, journal.partial(name), bytes(text))


def _copy(plan: Plan, journal: Journal, name: str) -> None:
    """Copy a side file, following a Hub cache's symbolic link, with the mode that new files get."""
    assert plan.source is not None
    source, target, partial = plan.source.side_file(name), journal.destination / name, journal.partial(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(partial, target)
        sync_directory(target.parent)
    except OSError as error:
        raise explain_os_error(error, f"cannot copy {source} to {target}") from None
