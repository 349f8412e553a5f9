"""`kconvert smoke`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from kconvert.cli.options import json_option, quiet_option
from kconvert.errors import CheckFailed, counted

if TYPE_CHECKING:
    from kconvert.chat.smoke import Check, SmokeReport


@click.command()
@click.argument("url", metavar="URL")
@click.option("--model", metavar="NAME", help="Which of the server's models [default: the only one].")
@click.option(
    "--api-key", envvar="OPENAI_API_KEY", metavar="KEY", help="Where it wants one [default: $OPENAI_API_KEY]."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, help="Seconds for an answer."
)
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Longest answer.")
@click.option("--no-reasoning", is_flag=True, help="The model does not think: an answer without reasoning is whole.")
@click.option("--no-tools", is_flag=True, help="The model calls no tools: leave these checks out.")
@click.option(
    "--long-words", type=click.IntRange(0), default=2000, show_default=True, help="Words of the long input; 0: none."
)
@click.option("--concurrency", type=click.IntRange(1, 1000), default=1, help="Then also so many chats at once.")
@json_option
@quiet_option
def smoke(
    url: str,
    model: str | None,
    api_key: str | None,
    timeout: float,
    max_tokens: int,
    no_reasoning: bool,
    no_tools: bool,
    long_words: int,
    concurrency: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Ask the OpenAI-compatible server at URL whether its model answers: chats, reasoning, tool calls, a long input.

    Each check is a line; one that fails says which setting of the server does it, and the command exits with 1. Without a
    server at URL it exits with 2. Needs the package openai: pip install 'kconvert-toolkit[smoke]'.

    \b
    Example: kconvert smoke http://localhost:8000/v1 --concurrency 64
    """
    import kconvert

    report = kconvert.smoke(
        url,
        model,
        api_key=api_key,
        timeout=timeout,
        max_tokens=max_tokens,
        reasoning=not no_reasoning,
        tools=not no_tools,
        long_words=long_words,
        concurrency=concurrency,
        told=None if as_json or quiet else _tell,
    )
    if as_json:
        click.echo(json.dumps({**asdict(report), "passed": report.passed}, indent=2))
    if report.failed:
        raise CheckFailed(_sentence(report))


def _tell(check: Check) -> None:
    mark = click.style("ok    ", fg="green") if check.passed else click.style("failed", fg="red")
    click.echo(f"{mark}  {check.name:<14}  {check.said}")


def _sentence(report: SmokeReport) -> str:
    first, *more = report.failed
    others = f" ({counted(len(more), 'more check')} failed)" if more else ""
    left = f" (not run: {', '.join(report.not_run)})" if report.not_run else ""
    return f"{first.name}: {first.said}{others}{left}"
