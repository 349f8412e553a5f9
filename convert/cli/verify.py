"""`kconvert verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kconvert.cli.options import directory, json_option, quiet_option, selection_options
from kconvert.cli.running import progress


@click.command()
@click.argument("source", metavar="SRC", type=directory)
@click.argument("output", metavar="DST", type=directory)
@click.option(
    "--sample", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Share of tensors compared."
)
@selection_options
@json_option
@quiet_option
def verify(source: Path, output: Path, sample: float, as_json: bool, quiet: bool, **selection: Any) -> None:
    """Prove that DST holds SRC's weights: every tensor there, sound, and equal to an independent decompression.

    Exits with 1 and the first differing tensor and element otherwise.

    \b
    Example: kconvert verify ./Kimi-K2-Thinking ./Kimi-K2-Thinking-BF16 --sample 0.01
    """
    import kconvert

    total = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    with progress(int(total * sample), quiet) as advance:
        report = kconvert.verify(source, output, sample=sample, advance=advance, **selection)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    elif not quiet:
        skipped = f", {report.skipped:,} not looked at (--sample)" if report.skipped else ""
        click.echo(
            f"verified: {report.weights:,} weights equal {report.reference} bit for bit, {report.tensors:,} tensors and "
            f"{report.side_files} side files are the source's{skipped}"
        )
