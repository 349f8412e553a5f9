"""kconvert: converts, repacks and re-quantises checkpoints of mixture-of-experts language models.

The public API is four functions; each takes a checkpoint's directory or Hub id and raises `KconvertError` with a one-sentence
message. They are defined here, after the modules of the same names are loaded, so that `kconvert.plan` is the function.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from kconvert.checkpoint.source import open_checkpoint
from kconvert.errors import CheckFailed, KconvertError
from kconvert.model import Model, understand
from kconvert.plan import Plan, make_plan
from kconvert.recipe import Recipe
from kconvert.verify import Report, verify
from kconvert.version import __version__ as __version__

if TYPE_CHECKING:
    from kconvert.transfer.disk import Needs

__all__ = [
    "CheckFailed",
    "KconvertError",
    "Model",
    "Plan",
    "Recipe",
    "Report",
    "__version__",
    "convert",
    "inspect",
    "plan",
    "verify",
]

StrPath = str | os.PathLike[str]


def inspect(source: StrPath, revision: str | None = None) -> Model:
    """What the checkpoint in directory `source` is: weights with role, shape and format, and the rest."""
    with _collector_paused():
        return understand(open_checkpoint(source, revision))


def plan(source: StrPath, recipe: Recipe, revision: str | None = None) -> Plan:
    """What a conversion will write, byte for byte; reads headers only."""
    with _collector_paused():
        return make_plan(understand(open_checkpoint(source, revision)), recipe)


def pinned(source: StrPath, destination: StrPath, revision: str | None = None) -> str | None:
    """The commit of the Hub that an earlier run into `destination` began with, if it read the same source; else `revision`."""
    from kconvert.journal import pinned_commit
    from kconvert.transfer.delivery import Delivery

    return pinned_commit(Delivery.to(destination).directory, os.fspath(source), revision) or revision


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A large checkpoint is a million small objects that all stay; the collector would walk them over and over."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check(
    plan: Plan,
    destination: StrPath,
    *,
    overwrite: bool = False,
    push: str | None = None,
    disk_budget: int | None = None,
) -> Needs:
    """KconvertError when `plan` cannot be carried out into `destination`; what a run needs, and finds finished already."""
    from kconvert.journal import finished_shards
    from kconvert.preflight import check_paths
    from kconvert.transfer.delivery import Delivery
    from kconvert.transfer.disk import survey

    delivery = Delivery.to(destination, push)
    if not overwrite and (published := delivery.published(plan)):
        return replace(survey(plan, delivery, published, disk_budget), is_done=True)
    if plan.source is not None and plan.source.directory is not None:
        check_paths(plan.source.directory, delivery.directory)
    finished = finished_shards(delivery.directory, plan, overwrite, delivery.push)
    needs = survey(plan, delivery, finished, disk_budget)
    needs.check(overwrite)
    delivery.check(plan, finished, overwrite)
    return needs


def convert(
    plan: Plan,
    destination: StrPath,
    *,
    threads: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
    found: Callable[[int], None] | None = None,
    push: str | None = None,
    disk_budget: int | None = None,
    command: str = "kconvert.convert",
) -> dict[str, int]:
    """Carry out `plan` into `destination`, or finish an earlier run that was interrupted.

    `destination` is a directory or a Hub id; `push` is a repository that gets the output of a directory, too, and `command`
    what reports and the model card say was typed. `disk_budget` bounds the bytes on the output's disk: source files from the
    Hub are deleted as soon as nothing needs them, and shards once they are on the Hub, if that is where they go.
    `memory` bounds the buffers in bytes; neither it nor `threads` changes a byte of the output. `overwrite` replaces the
    checkpoint in `destination`. `advance` is called from worker threads with the bytes written (of finished shards too),
    `found` once, at the beginning, with the bytes that an earlier run has finished.
    Returns how many groups of which weights lost something where nothing was to be lost (exact INT4), in this run.
    """
    advance, found = advance or (lambda nbytes: None), found or (lambda nbytes: None)
    from concurrent.futures import ThreadPoolExecutor

    from kconvert.engine import Limits, Run, warm_up
    from kconvert.finalize import finalize
    from kconvert.journal import Journal
    from kconvert.preflight import check_values
    from kconvert.transfer.staging import Staging

    needs = check(plan, destination, overwrite=overwrite, push=push, disk_budget=disk_budget)
    delivery = needs.delivery
    if needs.is_done:
        delivery.clear()
        found(plan.output_bytes)
        advance(plan.output_bytes)
        return {}
    if plan.source is not None:
        plan.source.check_index()
    with ThreadPoolExecutor(1) as background:
        if len(needs.finished) < len(plan.shards):
            background.submit(warm_up, plan)
        if not needs.fetches:
            check_values(plan, needs.finished)
        with Journal(delivery.directory, plan, overwrite, delivery.push, command) as journal:
            earlier = sum(shard.nbytes for shard in plan.shards if shard.name in journal.finished)
            found(earlier)
            advance(earlier)
            upload = delivery.open()
            with Staging(needs, journal, upload) as staging:
                run = Run(plan, staging, journal, Limits.choose(threads, memory), advance)
                run.execute()
                staging.drain()
            finalize(plan, journal)
            if upload is not None:
                delivery.publish(plan, journal, upload, command)
    return dict(run.inexact)
