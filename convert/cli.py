"""The `kconvert` command. The only code that prints; heavy modules are imported when a command runs."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias

import click

from kconvert import __version__
from kconvert.errors import CheckFailed, KconvertError
from kconvert.formats.conventions import CONVENTIONS
from kconvert.recipe import SCALES, TARGETS

Command: TypeAlias = Callable[..., Any]
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(click.ParamType[int]):
    """A number of bytes: 500000000, 500MB, 5GB, 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?I?)B?", str(value).upper())
        if match is None or match[2] not in UNITS:
            self.fail(f"{value!r} is not a size such as 500MB or 5GB", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


class Group(click.Group):
    """Turns our errors into one sentence on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CheckFailed as error:
            _fail("failed", str(error), 1)
        except KconvertError as error:
            _fail("error", str(error), 2)
        except KeyboardInterrupt:
            _fail("interrupted", "run the same command again to go on from here", 130)
        except BrokenPipeError:
            sys.exit(0)


def _fail(kind: str, message: str, code: int) -> None:
    click.echo(f"{click.style(kind, fg='red')}: {message}", err=True)
    sys.exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="kconvert")
def main() -> None:
    """Convert, repack and re-quantise checkpoints of mixture-of-experts language models, at the disk's speed.

    Shell completion: eval "$(_KCONVERT_COMPLETE=bash_source kconvert)" (or zsh_source, fish_source).
    """


directory = click.Path(file_okay=False, path_type=Path)
revision_option = click.option("--revision", help="Revision of SRC, when that is a repository of the Hub's cache.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")


def output_options(function: Command) -> Command:
    """Options of every command that writes a checkpoint."""
    options = [
        click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
        click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file."),
        click.option("--threads", type=click.IntRange(1, 256), help="Worker threads [default: cores + 2]."),
        click.option("--memory", type=Size(), help="Buffers of all workers together [default: 256MiB]."),
        click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DST."),
        json_option,
        quiet_option,
        click.option("-v", "--verbose", is_flag=True, help="Print the plan first."),
    ]
    return _apply(options, function)


def selection_options(function: Command) -> Command:
    """Options that choose weights by name."""
    options = [
        click.option("--include", multiple=True, metavar="GLOB", help="Only weights with such names; repeatable."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="No weights with such names; repeatable."),
    ]
    return _apply(options, function)


def _apply(options: Sequence[Callable[[Command], Command]], function: Command) -> Command:
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
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


def conversion(function: Command) -> Command:
    """The arguments and options that all conversions share."""

    @click.argument("source", metavar="SRC", type=directory)
    @click.argument("destination", metavar="DST", type=directory)
    @revision_option
    @selection_options
    @output_options
    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return command


@main.command("int4-to-bf16")
@conversion
def int4_to_bf16(source: Path, destination: Path, **options: Any) -> None:
    """Convert the INT4 checkpoint SRC to BF16 in DST; run it again to go on after an interruption.

    \b
    Example: kconvert int4-to-bf16 ./Kimi-K2-Thinking ./Kimi-K2-Thinking-BF16
    """
    _convert(source, destination, to="bf16", expect="int4", **options)


def layout_option(*targets: str) -> Callable[[Command], Command]:
    layouts = list(dict.fromkeys(layout for target in targets for layout in TARGETS[target] if layout))
    return click.option("--layout", type=click.Choice(layouts), help="Which weights, and in whose dialect.")


@main.command("int4-to-fp8")
@conversion
@layout_option("fp8")
def int4_to_fp8(source: Path, destination: Path, **options: Any) -> None:
    """Convert the INT4 checkpoint SRC to FP8 in DST.

    \b
    experts                     128x128 blocks, routed experts only; the rest stays bit for bit (the default)
    all                         128x128 blocks, every Linear: the layout of DeepSeek-V3 and Kimi-K2-Instruct
    compressed-tensors          128x128 blocks as llm-compressor's FP8_BLOCK
    compressed-tensors-channel  a scale for each row, as llm-compressor's FP8_DYNAMIC

    \b
    Example: kconvert int4-to-fp8 ./Kimi-K2-Thinking ./Kimi-K2-Thinking-FP8
    """
    _convert(source, destination, to="fp8", expect="int4", **options)


@main.command("fp8-to-bf16")
@conversion
def fp8_to_bf16(source: Path, destination: Path, **options: Any) -> None:
    """Convert the FP8 checkpoint SRC to BF16 in DST.

    \b
    Example: kconvert fp8-to-bf16 ./Kimi-K2-Instruct ./Kimi-K2-Instruct-BF16
    """
    _convert(source, destination, to="bf16", expect="fp8", **options)


scales_option = click.option(
    "--scales",
    type=click.Choice(SCALES),
    default="amax",
    show_default=True,
    help="INT4 and MX: by the largest value, or the best of a few by squared error.",
)


def packed_options(function: Command) -> Command:
    """Options of INT4."""
    options = [
        click.option(
            "--convention",
            type=click.Choice(list(CONVENTIONS)),
            default="kimi",
            show_default=True,
            help="INT4: whose rule makes scales and codes.",
        ),
        click.option(
            "--group-size", type=click.IntRange(8), default=32, show_default=True, help="INT4: columns to a scale."
        ),
        scales_option,
        click.option("--require-exact", is_flag=True, help="INT4: stop at values that no codes and scale reproduce."),
    ]
    return _apply(options, function)


@main.command("bf16-to-int4")
@conversion
@packed_options
def bf16_to_int4(source: Path, destination: Path, **options: Any) -> None:
    """Convert the BF16 checkpoint SRC to INT4 in DST, its routed experts only.

    If SRC was INT4 once, its codes and scales are found again, bit for bit; groups where there are none are quantised by
    the convention's rule and counted, or refused with --require-exact.

    \b
    Example: kconvert bf16-to-int4 ./Kimi-K2-Thinking-BF16 ./Kimi-K2-Thinking --require-exact
    """
    _convert(source, destination, to="int4", expect="bf16", **options)


@main.command("fp8-to-int4")
@conversion
@packed_options
def fp8_to_int4(source: Path, destination: Path, **options: Any) -> None:
    """Convert the FP8 checkpoint SRC to INT4 in DST, its routed experts only; the rest becomes BF16.

    \b
    Example: kconvert fp8-to-int4 ./Kimi-K2-Instruct ./Kimi-K2-Instruct-INT4
    """
    _convert(source, destination, to="int4", expect="fp8", **options)


@main.command()
@conversion
@packed_options
@click.option("--to", required=True, type=click.Choice(list(TARGETS)), help="The encoding to write.")
@layout_option(*TARGETS)
def convert(source: Path, destination: Path, to: str, **options: Any) -> None:
    """Convert the checkpoint SRC, in any encoding that can be read, to another one in DST.

    \b
    Example: kconvert convert ./Kimi-K2-Thinking ./Kimi-K2-Thinking-BF16 --to bf16
    """
    _convert(source, destination, to=to, expect=None, **options)


def _convert(
    source: Path,
    destination: Path,
    *,
    to: str,
    expect: str | None,
    revision: str | None,
    **options: Any,
) -> None:
    import kconvert

    # What a command does not offer keeps the recipe's default.
    names = options.keys() & {field.name for field in fields(kconvert.Recipe)}
    chosen = {name: options.pop(name) for name in names}
    recipe = kconvert.Recipe(to, expect, **{name: value for name, value in chosen.items() if value is not None})
    _carry_out(kconvert.plan(source, recipe, revision), destination, **options)


def _carry_out(
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
) -> None:
    import kconvert
    from kconvert.summary import Outcome, describe_plan

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
    outcome = Outcome.now(plan, destination, time.monotonic() - started, inexact)
    if as_json:
        click.echo(json.dumps(outcome.as_dict(), indent=2))
    elif not quiet:
        click.echo(outcome.as_text())


@main.command()
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


DIMENSIONS = {
    "layers": "Layers in all.",
    "dense-layers": "Layers without experts, at the beginning.",
    "experts": "Routed experts of a layer.",
    "hidden": "Hidden size.",
    "intermediate": "Width of a dense MLP.",
    "moe-intermediate": "Width of an expert.",
    "vocab": "Vocabulary.",
    "heads": "Attention heads.",
    "q-rank": "Rank of the query compression.",
    "kv-rank": "Rank of the key/value compression.",
}


def dimension_options(function: Command) -> Command:
    return _apply(
        [click.option(f"--{name}", type=click.IntRange(0), help=text) for name, text in DIMENSIONS.items()], function
    )


@main.command()
@click.argument("destination", metavar="DST", type=directory)
@click.option("--like", default="kimi-k2-thinking", show_default=True, help="The manifest whose shape it takes.")
@click.option("--from", "origin", type=directory, metavar="SRC", help="Cut real weights out of SRC instead.")
@click.option("--scatter", is_flag=True, help="Put the tensors of one weight into different shards.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the synthetic weights.")
@dimension_options
@output_options
def sample(
    destination: Path, like: str, origin: Path | None, scatter: bool, seed: int, shard_size: int, **options: Any
) -> None:
    """Write a small checkpoint to DST: synthetic in a model's exact shape, or the first layers and experts of SRC.

    Sizes that are not given stay the model's own, so without any this writes 594 GB.

    \b
    Example: kconvert sample ./tiny --layers 3 --experts 8 --hidden 512 --vocab 1024
    """
    from kconvert.checkpoint.source import open_checkpoint
    from kconvert.sample import SampleRecipe, plan_cut, plan_synthetic

    given = {name.replace("-", "_"): options.pop(name.replace("-", "_")) for name in DIMENSIONS}
    sizes = {name: size for name, size in given.items() if size is not None}
    recipe = SampleRecipe(like, sizes, shard_size, scatter, seed)
    plan = plan_synthetic(recipe) if origin is None else plan_cut(open_checkpoint(origin), recipe)
    _carry_out(plan, destination, **options)


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
