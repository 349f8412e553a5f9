"""`kconvert inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kconvert.cli.options import directory, json_option, revision_option


@click.command()
@click.argument("source", metavar="SRC", type=directory)
@revision_option
@json_option
def inspect(source: Path, revision: str | None, as_json: bool) -> None:
    """Say what SRC is: family, sizes, formats, roles and findings.

    \b
    Example: kconvert inspect ./Kimi-K2-Thinking
    """
    import kconvert
    from kconvert.summary import summarise

    summary = summarise(kconvert.inspect(source, revision))
    click.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.as_text())
