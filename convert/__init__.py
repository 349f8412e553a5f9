"""kconvert: converts, repacks and re-quantises checkpoints of mixture-of-experts language models.

The public API is four functions; each takes a checkpoint's directory and raises `KconvertError` with a one-sentence
message. They are defined here, after the modules of the same names are loaded, so that `kconvert.plan` is the function.
"""

from __future__ import annotations

__version__ = "0.1.0"

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from kconvert.checkpoint.source import open_checkpoint
from kconvert.errors import CheckFailed, KconvertError
from kconvert.model import Model, understand
from kconvert.plan import Plan, make_plan
from kconvert.recipe import Recipe
from kconvert.verify import Report, verify

__all__ = ["CheckFailed", "KconvertError", "Model", "Plan", "Recipe", "Report", "convert", "inspect", "plan", "verify"]

StrPath = str | os.PathLike[str]


def inspect(source: StrPath, revision: str | None = None) -> Model:
    """What the checkpoint in directory `source` is: weights with role, shape and format, and the rest."""
    with _collector_paused():
        return understand(open_checkpoint(source, revision))


def plan(source: StrPath, recipe: Recipe, revision: str | None = None) -> Plan:
    """What a conversion will write, byte for byte; reads headers only."""
    with _collector_paused():
        return make_plan(understand(open_checkpoint(source, revision)), recipe)


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


def check(plan: Plan, destination: StrPath, *, overwrite: bool = False) -> set[str]:
    """KconvertError when `plan` cannot be carried out into `destination`; the names of the shards finished earlier."""
    from kconvert.journal import finished_shards
    from kconvert.preflight import check_paths, check_space

    target = Path(destination)
    if plan.source is not None:
        check_paths(plan.source.root, target)
    finished = finished_shards(target, plan, overwrite)
    check_space(plan, target, finished, overwrite)
    return finished


def convert(
    plan: Plan,
    destination: StrPath,
    *,
    threads: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Carry out `plan` into directory `destination`, or finish an earlier run that was interrupted.

    `memory` bounds the buffers in bytes; neither it nor `threads` changes a byte of the output. `overwrite` replaces the
    checkpoint in `destination`. `advance` is called from worker threads with the bytes written (of finished shards too).
    Returns how many groups of which weights lost something where nothing was to be lost (exact INT4), in this run.
    """
    advance = advance or (lambda nbytes: None)
    from concurrent.futures import ThreadPoolExecutor

    from kconvert.engine import Limits, Run, warm_up
    from kconvert.finalize import finalize
    from kconvert.journal import Journal
    from kconvert.preflight import check_values

    target = Path(destination)
    finished = check(plan, target, overwrite=overwrite)
    with ThreadPoolExecutor(1) as background:
        if len(finished) < len(plan.shards):
            background.submit(warm_up, plan)
        check_values(plan, finished)
        with Journal(target, plan, overwrite) as journal:
            advance(sum(shard.nbytes for shard in plan.shards if shard.name in journal.finished))
            with plan.source.reader() if plan.source else nullcontext() as reader:
                run = Run(plan, reader, journal, Limits.choose(threads, memory), advance)
                run.execute()
            finalize(plan, journal)
    return dict(run.inexact)
