"""`kconvert check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kconvert.cli.options import json_option, links_option, location_or_gguf, quiet_option
from kconvert.cli.running import progress, stored_bytes
from kconvert.errors import counted

if TYPE_CHECKING:
    from kconvert.proof.certificate import Certificate


@click.command()
@click.argument("output", metavar="DIR", type=location_or_gguf)
@click.argument("certificate", metavar="FILE.json", type=click.Path(path_type=Path))
@links_option
@json_option
@quiet_option
def check(output: str, certificate: Path, as_json: bool, quiet: bool) -> None:
    """Hash DIR again: is every tensor and file still the one that `kconvert verify --certificate` has proven?

    Exits with 1 and the first that differs, is missing or is there besides. It reads DIR once, as fast as an engine that loads
    it, and needs neither the source nor torch. Who could have changed DIR may have changed the certificate: `verify` prints
    its sha256.

    \b
    Example: kconvert check ./Kimi-K2-Thinking-BF16 Kimi-K2-Thinking-BF16.certificate.json
    """
    import kconvert

    with progress(stored_bytes(output), quiet) as advance:
        found = kconvert.check_certificate(output, certificate, advance)
    facts = {
        "tensors": len(found.tensors),
        "files": len(found.files),
        "not_compared": len(found.not_compared),
        "source": found.source,
        "standard": found.standard,
        "reference": found.reference,
        "outcomes": dict(found.outcomes),
        "kconvert": found.version,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    elif not quiet:
        count = len(found.not_compared)
        left = f", but for {counted(count, 'tensor')} that it did not compare" if count else ""
        click.echo(
            f"checked: {counted(len(found.tensors), 'tensor')} and {counted(len(found.files), 'file')} are those that kconvert "
            f"{found.version} has verified against {found.source} ({_proven(found)}){left}; they were held to {found.reference}"
        )


def _proven(found: Certificate) -> str:
    """What `verify` has shown of the weights."""
    from kconvert.proof.certificate import OUTCOMES, PLANNED

    if found.standard == "limits":
        return "within limits"
    words = {OUTCOMES["limits"]: "within limits", PLANNED: "with groups that differ as planned"}
    but = [f"{counted(found.outcomes[key], 'weight')} {what}" for key, what in words.items() if found.outcomes[key]]
    return f"exact, but for {' and '.join(but)}" if but else "exact"
