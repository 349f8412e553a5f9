"""Carries out a plan in front of a person: the plan's description, a progress bar, the closing summary."""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kconvert.planning.plan import Plan
    from kconvert.report.ranks import Share
    from kconvert.report.summary import Summary


def pinned(source: str, destination: str, revision: str | None, *, overwrite: bool, **_: Any) -> str | None:
    """The revision to read `source` at: that of the run that this one goes on with, or the one asked for."""
    import kconvert

    return revision if overwrite else kconvert.pinned(source, destination, revision)


def carry_out(
    plan: Plan,
    destination: str,
    *,
    dry_run: bool,
    threads: int | None,
    memory: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    trace: str | None,
    launch: Summary | None = None,
    **terms: Any,
) -> None:
    """Carry out `plan` or, with `dry_run`, describe it; `launch` is the command that serves the result.

    `terms` are the options of `kconvert.convert` that say on what terms it runs, as `overwrite` and `check_first`.
    """
    import kconvert
    from kconvert.report.summary import Outcome, describe_plan
    from kconvert.run.delivery import Delivery
    from kconvert.run.trace import Trace

    delivery, share = Delivery.to(destination, terms["push"]), _share(plan, terms["worker"])
    if dry_run or (verbose and not as_json):
        rank = share.rank if share is not None else None
        description = describe_plan(plan, delivery, threads, memory, terms["disk_budget"], rank)
        _print(description if share is None else share.describe(description), as_json)
    if dry_run:
        kconvert.check(plan, destination, **terms)
        return
    started = time.monotonic()
    command = shlex.join(["kconvert", *sys.argv[1:]])
    earlier: list[int] = []
    watch = Trace(trace)
    with progress(plan.output_bytes if share is None else share.nbytes, quiet) as advance:
        inexact = kconvert.convert(
            plan,
            destination,
            threads=threads,
            memory=memory,
            advance=advance,
            found=earlier.append,
            trace=watch,
            command=command,
            **terms,
        )
    seconds = time.monotonic() - started
    if quiet and not as_json:
        return
    if share is None:
        _print(Outcome.now(plan, delivery, seconds, inexact, launch, sum(earlier), watch.bound), as_json)
    else:
        _print(share.outcome(plan, delivery, seconds, inexact, sum(earlier), watch.bound), as_json)


def _print(summary: Summary, as_json: bool) -> None:
    click.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.as_text())


def stored_bytes(output: str) -> int:
    """The size of the files with weights that are there; 0 of what lies on the Hub."""
    from kconvert.models.amx import KT_GLOB

    files = [path for glob in ("*.safetensors", "*.gguf", KT_GLOB) for path in Path(output).glob(glob)]
    return sum(path.stat().st_size for path in files or [Path(output)] if path.is_file())


def _share(plan: Plan, worker: str | None) -> Share | None:
    """What a rank has of a plan, if this is one."""
    if worker is None:
        return None
    from kconvert.report.ranks import Share
    from kconvert.run.state.ranks import Rank

    return Share.of(plan, Rank.parse(worker, {}))


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr, redrawn once a second at most; none when that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    lock = threading.Lock()
    bar = tqdm(total=total, unit="B", unit_scale=True, mininterval=1)

    def advance(nbytes: int) -> None:
        with lock:
            bar.update(nbytes)

    try:
        yield advance
    finally:
        bar.close()
