"""`kconvert diff`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kconvert.cli.options import json_option, links_option, location_or_gguf, quiet_option
from kconvert.cli.running import progress

if TYPE_CHECKING:
    from kconvert.proof.diff import Change, Difference

BAR = 30
KEYS = 12  # of config.json, most that are listed
MARKS = {"added": ("+", "green"), "removed": ("-", "red"), "dtype": ("!", "yellow"), "shape": ("!", "yellow")}


@click.command()
@click.argument("before", metavar="A", type=location_or_gguf)
@click.argument("after", metavar="B", type=location_or_gguf)
@click.option("--headers", is_flag=True, help="Compare names, dtypes and shapes only, no values.")
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="Most tensors listed; 0: all.")
@links_option
@json_option
@quiet_option
def diff(before: str, after: str, headers: bool, limit: int, as_json: bool, quiet: bool) -> None:
    """Say which tensors differ between A and B: in name, dtype, shape or value, as their bytes lie in the files.

    Exits with 1 when any does. For checkpoints that spell the same weights in different encodings see `kconvert verify`.

    \b
    Example: kconvert diff ./Kimi-K2-Thinking ./Kimi-K2-Thinking-again
    """
    from kconvert.proof.diff import diff as compare

    total = 0 if headers else sum(path.stat().st_size for path in Path(after).glob("*.safetensors"))
    with progress(total, quiet or headers) as advance:
        found = compare(before, after, values=not headers, advance=advance)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    elif not quiet:
        for line in _lines(found, limit):
            click.echo(line)
    if found.changes or found.config:
        sys.exit(1)


def _lines(found: Difference, limit: int) -> Iterator[str]:
    """In the manner of `git diff --stat`."""
    listed = found.changes[: limit or None]
    width = max((len(change.name) for change in listed), default=0)
    for change in listed:
        yield f" {change.name:<{width}} | {_detail(change)}"
    if len(listed) < len(found.changes):
        yield f" … and {len(found.changes) - len(listed):,} more"
    if found.config:
        more = f" … and {len(found.config) - KEYS:,} more" if len(found.config) > KEYS else ""
        yield f" config.json | {', '.join(found.config[:KEYS])}{more}"
    counts = ", ".join(f"{count:,} {_counted(kind)}" for kind, count in sorted(found.counts.items()))
    listed_counts = f" ({counts})" if counts else ""
    yield f" {len(found.changes):,} changed{listed_counts}, {found.same:,} the same"


def _counted(kind: str) -> str:
    return kind if kind in ("added", "removed") else f"in {kind}"


def _detail(change: Change) -> str:
    if change.changed is not None and change.elements:
        share = change.changed / change.elements
        bar = click.style("#" * max(1, round(BAR * share)), fg="yellow")
        return f"{change.changed:,} of {change.elements:,} elements {bar}"
    mark, colour = MARKS[change.kind]
    text = change.after or change.before or ""
    if change.before and change.after:
        text = f"{change.before} -> {change.after}"
    return f"{click.style(mark, fg=colour)} {text}"
