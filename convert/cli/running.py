"""Carries out a plan in front of a person: the plan's description, a progress bar, the closing summary."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


def carry_out(
    plan: Any,
    destination: Path,
    *,
    dry_run: bool,
    threads: int | None,
    memory: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    launch: str = "",
) -> None:
    """Carry out `plan` or, with `dry_run`, describe it; `launch` is the command that uses the result."""
    import kconvert
    from kconvert.summary import Outcome, describe_plan

    if dry_run or (verbose and not as_json):
        description = describe_plan(plan, destination, threads, memory)
    if dry_run:
        click.echo(json.dumps(description.as_dict(), indent=2) if as_json else description.as_text())
        kconvert.check(plan, destination, overwrite=overwrite)
        return
    if verbose and not as_json:
        click.echo(description.as_text())
    started = time.monotonic()
    with progress(plan.output_bytes, quiet) as advance:
        inexact = kconvert.convert(
            plan, destination, threads=threads, memory=memory, overwrite=overwrite, advance=advance
        )
    outcome = Outcome.now(plan, destination, time.monotonic() - started, inexact, launch)
    if as_json:
        click.echo(json.dumps(outcome.as_dict(), indent=2))
    elif not quiet:
        click.echo(outcome.as_text())


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr, redrawn once a second at most; none when that is no terminal."""
    from tqdm import tqdm

    lock = threading.Lock()
    bar = tqdm(total=total, unit="B", unit_scale=True, mininterval=1, disable=quiet or not sys.stderr.isatty())

    def advance(nbytes: int) -> None:
        with lock:
            bar.update(nbytes)

    try:
        yield advance
    finally:
        bar.close()
