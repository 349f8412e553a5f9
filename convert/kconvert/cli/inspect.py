"""`kconvert inspect`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kconvert.cli.options import json_option, links_option, location_or_gguf, report_option, revision_option

if TYPE_CHECKING:
    from kconvert.models.model import Model


@click.command()
@click.argument("source", metavar="SRC", type=location_or_gguf)
@revision_option
@links_option
@report_option
@json_option
def inspect(source: str, revision: str | None, report: Path | None, as_json: bool) -> None:
    """Say what SRC is: family, sizes, formats, roles and findings; SRC may be a GGUF file.

    A report also looks into a sample of the weights: whose convention INT4 codes follow, how codes and scales are used.

    \b
    Example: kconvert inspect ./Kimi-K2-Thinking --report inventory.html
    """
    import kconvert
    from kconvert.checkpoint.gguf_files import is_gguf, open_gguf
    from kconvert.models.amx import is_amx, open_amx
    from kconvert.report import check_report_path
    from kconvert.report.gguf import summarise_gguf
    from kconvert.report.summary import summarise, summarise_amx

    kind = "AMX" if is_amx(Path(source)) else "GGUF" if is_gguf(source) else None
    if kind is not None:
        if report is not None:
            raise click.UsageError(
                f"there is no report on {kind} weights alone; `kconvert verify SRC DST` compares them"
            )
        summary = summarise_amx(open_amx(Path(source))) if kind == "AMX" else summarise_gguf(open_gguf(source))
    else:
        if report is not None:
            check_report_path(report)
        model = kconvert.inspect(source, revision)
        if report is not None:
            _write_report(model, report)
        summary = summarise(model)
    click.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.as_text())


def _write_report(model: Model, path: Path) -> None:
    from kconvert.proof.inventory import take_inventory
    from kconvert.report import write_report
    from kconvert.report.document import inspect_document

    command = shlex.join(["kconvert", *sys.argv[1:]])
    write_report(inspect_document(model, take_inventory(model), command), path)
