"""`kconvert finalize`."""

from __future__ import annotations

import json

import click

from kconvert.cli.options import json_option, location, quiet_option
from kconvert.errors import counted, human


@click.command()
@click.argument("destination", metavar="DST", type=location)
@json_option
@quiet_option
def finalize(destination: str, as_json: bool, quiet: bool) -> None:
    """Close DST, to which all ranks of a conversion (--worker) have written: look at every shard, write config.json and index.

    SRC is not needed any more. While shards are missing nothing is written; the ranks that must run again are named.

    \b
    Example: kconvert finalize ./Kimi-K2-Thinking-BF16
    """
    import kconvert

    closed = kconvert.finalize(destination)
    if as_json:
        facts = {"output": destination, "shards": closed.shards, "bytes": closed.nbytes, "before": closed.before}
        click.echo(json.dumps(facts, indent=2))
    elif not quiet:
        what = f"{human(closed.nbytes)} in {counted(closed.shards, 'shard')}"
        click.echo(f"{destination} {'was closed already' if closed.before else 'is complete'}: {what}")
