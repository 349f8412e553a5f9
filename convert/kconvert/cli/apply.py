"""`kconvert apply`."""

from __future__ import annotations

import json

import click

from kconvert.cli.options import json_option, location, quiet_option
from kconvert.errors import counted, human


@click.command()
@click.argument("destination", metavar="DST", type=location)
@click.argument("patch", metavar="PATCH", type=location)
@json_option
@quiet_option
def apply(destination: str, patch: str, as_json: bool, quiet: bool) -> None:
    """Merge PATCH, what changed in a training since an export, into DST, a copy of that export.

    PATCH is what `kconvert_qat.export(..., only_changed=True)` wrote. DST is no checkpoint from the first byte that is written
    to the last; run the same command again to go on after an interruption.

    \b
    Example: kconvert apply ./rollouts ./patch-0001
    """
    import kconvert

    done = kconvert.apply(destination, patch)
    if as_json:
        facts = {"output": destination, "tensors": done.tensors, "bytes": done.nbytes, "before": done.before}
        click.echo(json.dumps(facts, indent=2))
    elif not quiet:
        what = "has it already" if done.before else f"got {counted(done.tensors, 'tensor')}, {human(done.nbytes)}"
        click.echo(f"{destination} {what}")
