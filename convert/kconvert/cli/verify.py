"""`kconvert verify`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kconvert.cli.options import (
    Command,
    apply,
    engine_option,
    json_option,
    links_option,
    location,
    location_or_gguf,
    quiet_option,
    ray_address_option,
    report_option,
    selection_options,
)
from kconvert.cli.running import progress, stored_bytes
from kconvert.errors import CheckFailed, counted
from kconvert.proof.parity.metrics import CEILINGS, FLOORS, Errors, spelled

if TYPE_CHECKING:
    from kconvert.proof.logits import Agreement, LogitsReport
    from kconvert.proof.parity.compare import Comparison
    from kconvert.proof.verify import Report


class Bound(click.ParamType[tuple[str, float]]):
    """A metric and a number: sqnr=30."""

    name = "metric=number"

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = metrics

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        metric, _, number = str(value).partition("=")
        if metric not in self._metrics:
            self.fail(f"{value!r} is not METRIC=NUMBER with one of {', '.join(self._metrics)}", param, ctx)
        try:
            return metric, float(number)
        except ValueError:
            self.fail(f"{number!r} is not a number", param, ctx)


def standard_options(function: Command) -> Command:
    """Options that say what a weight is held to; the function gets them as a `standard`."""

    @wraps(function)
    def command(
        *,
        close: bool,
        fail_under: tuple[tuple[str, float], ...],
        fail_over: tuple[tuple[str, float], ...],
        **options: Any,
    ) -> Any:
        from kconvert.proof.parity.compare import Standard
        from kconvert.proof.parity.metrics import Limits

        limits = Limits(dict(fail_under), dict(fail_over))
        return function(standard=Standard(not (close or fail_under or fail_over), limits), **options)

    close_help = "DST was made by other means: judge by error, within its formats' usual limits, not by bit equality."
    floors_help = f"Limit for every weight, instead of the usual: {' or '.join(FLOORS)}; implies --close."
    ceilings_help = f"The same for {', '.join(CEILINGS)}."
    options = [
        click.option("--close", is_flag=True, help=close_help),
        click.option("--fail-under", type=Bound(FLOORS), multiple=True, metavar="METRIC=X", help=floors_help),
        click.option("--fail-over", type=Bound(CEILINGS), multiple=True, metavar="METRIC=X", help=ceilings_help),
    ]
    return apply(options, command)


def logits_options(function: Command) -> Command:
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    options = [
        click.option("--logits", is_flag=True, help="Also compare the logits of both, in transformers; small models."),
        click.option("--text", type=file, metavar="FILE", help="Text for --logits [default: random tokens]."),
        click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens for --logits."),
    ]
    return apply(options, function)


certificate_option = click.option(
    "--certificate",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="Write the sha256 of each tensor and file of DST, once all have passed; for `kconvert check`.",
)


@click.command()
@click.argument("source", metavar="SRC", type=location)
@click.argument("output", metavar="DST", type=location_or_gguf)
@click.option(
    "--sample", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Share of tensors compared."
)
@standard_options
@certificate_option
@logits_options
@selection_options
@engine_option
@ray_address_option
@links_option
@report_option
@json_option
@quiet_option
def verify(
    source: str,
    output: str,
    sample: float,
    certificate: Path | None,
    logits: bool,
    text: Path | None,
    tokens: int,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Prove that DST holds SRC's weights: every tensor there, sound, and equal to an independent decompression.

    DST may be a GGUF file, whoever made it.

    Exits with 1 and the first differing tensor and element otherwise. With --report all faults are collected, and errors are
    measured on all values; without, equality is checked on all and what was lost is told of each weight's first rows.

    \b
    Example: kconvert verify ./Kimi-K2-Thinking ./Kimi-K2-Thinking-BF16 --sample 0.01 --report parity.html
    """
    import kconvert
    from kconvert.checkpoint.gguf_files import is_gguf
    from kconvert.models.amx import is_amx
    from kconvert.proof.logits import compare_logits
    from kconvert.report import check_report_path

    if logits and is_gguf(output):
        raise click.UsageError("what transformers runs is no GGUF file: leave out --logits")
    if is_amx(Path(output)) and (logits or options["include"] or options["exclude"]):
        raise click.UsageError(
            "AMX weights are all the experts and no model that transformers runs: leave out --logits, --include and --exclude"
        )
    if certificate is not None:
        _check_certifiable(certificate, sample)
    if report is not None:
        check_report_path(report)
    with progress(int(stored_bytes(output) * sample), quiet) as advance:
        found = kconvert.verify(
            source,
            output,
            sample=sample,
            keep_going=report is not None,
            thorough=report is not None or as_json,
            digest=certificate is not None,
            advance=advance,
            **options,
        )
    wanted = logits and not found.faults
    said = compare_logits(found.source, found.output, text=text, tokens=tokens) if wanted else None
    _tell(found, said, report, as_json, quiet)
    if certificate is not None:
        tensors = found.output.checkpoint.tensors
        with progress(sum(t.nbytes for t in tensors.values() if t.name not in found.digests), quiet) as advance:
            digest = kconvert.certify(found, certificate, advance)
        if not (quiet or as_json):
            click.echo(f"certified: {counted(len(tensors), 'tensor')} of DST in {certificate} (sha256 {digest})")


def _check_certifiable(certificate: Path, sample: float) -> None:
    """What would be known too late otherwise."""
    from kconvert.proof.certificate import check_path

    if sample < 1:
        raise click.UsageError("a certificate is of every tensor: leave out --sample")
    check_path(certificate)


def _tell(found: Report, said: LogitsReport | None, report: Path | None, as_json: bool, quiet: bool) -> None:
    from kconvert.report import write_report
    from kconvert.report.document import verify_document

    command = shlex.join(["kconvert", *sys.argv[1:]])
    if report is not None:
        write_report(verify_document(found, command, said), report)
    if found.faults:
        more = f" ({len(found.faults) - 1:,} more in {report})" if len(found.faults) > 1 else ""
        raise CheckFailed(found.faults[0] + more)
    if as_json:
        click.echo(json.dumps(verify_document(found, command, said, details=False), indent=2))
    elif not quiet:
        click.echo(_sentence(found))
        for line in _gguf_lines(found):
            click.echo(line)
        for line in _logits_lines(said) if said else ():
            click.echo(line)


def _gguf_lines(report: Report) -> Iterator[str]:
    """Of a GGUF file: which of its types have the source's values, and what is missing or there besides."""
    from kconvert.checkpoint.gguf_files import GgufCheckpoint

    if not isinstance(report.output.checkpoint, GgufCheckpoint):
        return
    kinds: dict[tuple[str, bool], list[Comparison]] = {}
    for comparison in report.comparisons:
        kinds.setdefault((comparison.output_format, comparison.judged_by == "limits"), []).append(comparison)
    for (label, limited), group in kinds.items():
        errors = sum((comparison.errors for comparison in group), Errors())
        figures = (
            f"off by {spelled('frobenius', errors.frobenius)}, {spelled('sqnr', errors.sqnr)}" if errors.sqnr else ""
        )
        figures = figures or "which have the source's values all the same"
        changed = sum(comparison.changed for comparison in group)
        but = f" but for {counted(changed, 'group')}" * bool(changed)
        said = figures if limited else f"the source's value for value{but}"
        yield f"{label}: {counted(len(group), 'weight')}, {said}"
    yield from (f"note: {note}" for note in report.notes)


def _logits_lines(said: LogitsReport) -> Iterator[str]:
    """The agreement of the logits, and what to make of it."""
    experts = "" if said.experts is None else f", {said.experts:.2%} of the routed experts in common"
    yield f"logits on {said.text}: {_agreement(said.free)}{experts}"
    if said.routed is not None and said.experts != 1:
        yield f"with the source's routing: {_agreement(said.routed)}"
        yield said.note


def _agreement(found: Agreement) -> str:
    return f"max abs {found.max_abs:.4g}, KL {found.kl:.3g}, same top 1 {found.top1:.2%}"


def _sentence(report: Report) -> str:
    weights = counted(report.weights, "weight")
    rest = {"tensor": report.tensors, "side file": report.side_files * report.standard.exact}
    are = "is" if sum(rest.values()) == 1 else "are"
    listed = " and ".join(counted(number, noun) for noun, number in rest.items() if number)
    others = f"; {listed} {are} the source's" if listed else ""
    skipped = f", {report.skipped:,} not looked at (--sample)" if report.skipped else ""
    errors = sum((comparison.errors for comparison in report.comparisons), Errors())
    lost = ""
    if errors.sqnr is not None:
        where = "" if report.thorough else " in each weight's first rows"
        lost = f"; lost{where}: {spelled('frobenius', errors.frobenius)}, {spelled('sqnr', errors.sqnr)}"
    return f"verified: {weights} {_agreement_of_weights(report)}{others}{skipped}{lost}"


def _agreement_of_weights(report: Report) -> str:
    """How the weights stand to what they were held to; only those that have to be equal are called so."""
    equal, near = ("equals", "is near") if report.weights == 1 else ("equal", "are near")
    judges = {comparison.judged_by for comparison in report.comparisons}
    if "limits" in judges:
        return f"{near if judges == {'limits'} else f'{equal} or {near}'} {report.reference}"
    alone = [comparison for comparison in report.comparisons if comparison.judged_by == "values"]
    signs = sum(not (comparison.equal or comparison.changed) for comparison in alone)
    changed = sum(comparison.changed for comparison in alone)
    lost = f", but for the signs of zeros in {counted(signs, 'weight')}" * bool(signs)
    lost += f", but for {counted(changed, 'group')} that differ{'s' * (changed == 1)} as planned" * bool(changed)
    return f"{equal} {report.reference}{', bit for bit' * report.standard.exact}{lost}"
