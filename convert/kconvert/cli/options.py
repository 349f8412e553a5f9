"""The options that commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from kconvert.checkpoint.directory import links_allowed
from kconvert.checkpoint.files import exists, is_directory
from kconvert.formats.conventions import CONVENTIONS
from kconvert.targets.base import ATTENTIONS, POWERS, RESTS, SCALES, WIDE
from kconvert.targets.registry import layouts_of

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


class Location(click.ParamType[str]):
    """A directory, a Hub id or a store's address, as it was typed: a path would make one slash of the two in hf://; or a GGUF
    file, where such are read."""

    name = "location"

    def __init__(self, gguf: bool = False) -> None:
        self._gguf = gguf

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if exists(value) and not is_directory(value):
            is_source = param is not None and param.name == "source"
            if not (self._gguf or is_source) or not _is_gguf(value):
                self.fail(f"{value!r} is a file; give a directory, a Hub id or s3://…", param, ctx)
            if not self._gguf:
                told = "which inspect, diff and sample --from read, and verify as its DST"
                self.fail(f"{value!r} is a GGUF, {told}; give the checkpoint that it was made of", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file" if self._gguf else "dir")]


def _is_gguf(path: str) -> bool:
    from kconvert.checkpoint.gguf_files import is_gguf

    return is_gguf(path)


location = Location()
location_or_gguf = Location(gguf=True)
revision_option = click.option(
    "--revision",
    help="Branch, tag or commit of SRC: a Hub id (unless there is such a directory), or in the Hub's cache.",
)


def _follow_links(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.with_resource(links_allowed())


links_option = click.option(
    "--allow-links",
    is_flag=True,
    expose_value=False,
    callback=_follow_links,
    help="Follow links that lead out of a checkpoint; the Hub's cache needs no such leave.",
)
report_option = click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a report: FILE.html or FILE.json.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")


engine_option = click.option(
    "--engine",
    type=click.Choice(["threads", "ray"]),
    default="threads",
    show_default=True,
    help="ray: by the machines of a Ray cluster, which all see SRC and DST.",
)
ray_address_option = click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="With --engine ray: the cluster [default: the one at hand, or this machine].",
)


def _parse_worker(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """As I/N, before anything is read: what is wrong with it shows at once."""
    if value is None:
        return None
    from kconvert.run.state.ranks import Rank

    rank = Rank.parse(value, os.environ)
    return f"{rank.index}/{rank.count}"


def output_options(function: Command) -> Command:
    """Options of every command that writes a checkpoint."""
    options = [
        click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
        click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file."),
        click.option("--threads", type=click.IntRange(1, 256), help="Worker threads [default: cores + 3]."),
        click.option("--memory", type=Size(), help="Buffers of all workers together [default: 256MiB]."),
        click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DST."),
        click.option("--push", metavar="ORG/NAME", help="Send the output to this repository of the Hub, too."),
        click.option(
            "--disk-budget", type=Size(), help="Most bytes on DST's disk: delete what has served [default: keep]."
        ),
        click.option(
            "--worker",
            metavar="I/N",
            callback=_parse_worker,
            help="Be number I of N processes, from 0 on, that share the shards; slurm, torchrun, kubernetes or auto: as "
            "the launcher says.",
        ),
        click.option("--finalize-when-complete", is_flag=True, help="With --worker: who ends last closes DST."),
        click.option("--check-first", is_flag=True, help="Read all scales of SRC before anything is written."),
        click.option(
            "--trace",
            type=click.Path(dir_okay=False),
            metavar="FILE",
            help="Write what the workers did when, for Perfetto.",
        ),
        engine_option,
        ray_address_option,
        json_option,
        quiet_option,
        click.option("-v", "--verbose", is_flag=True, help="Print the plan first."),
    ]
    return apply(options, function)


def selection_options(function: Command) -> Command:
    """Options that choose weights by name."""
    options = [
        click.option("--include", multiple=True, metavar="GLOB", help="Only weights with such names; repeatable."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="No weights with such names; repeatable."),
    ]
    return apply(options, function)


def apply(options: Sequence[Callable[[Command], Command]], function: Command) -> Command:
    for option in reversed(options):
        function = option(function)
    return function


def conversion(function: Command) -> Command:
    """The arguments and options that all conversions share."""

    @click.argument("source", metavar="SRC", type=location)
    @click.argument("destination", metavar="DST", type=location)
    @revision_option
    @links_option
    @selection_options
    @output_options
    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return command


def layout_option(*targets: str) -> Callable[[Command], Command]:
    layouts = list(dict.fromkeys(layout for target in targets for layout in layouts_of(target)))
    return click.option("--layout", type=click.Choice(layouts), help="Which weights, and in whose dialect.")


scales_option = click.option(
    "--scales",
    type=click.Choice((*SCALES, POWERS, WIDE)),
    default="amax",
    show_default=True,
    help="INT4, FP8, MX, NVFP4: by the largest value, or the best by squared error; FP8: powers of two; mlx: F32.",
)


attention_option = click.option(
    "--attention", type=click.Choice(ATTENTIONS), help="NVFP4: what attention becomes [default: bf16]."
)
rest_option = click.option(
    "--rest", type=click.Choice(RESTS), help="GGUF: what matrices become whose codes it does not take [default: bf16]."
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
        click.option("--require-exact", is_flag=True, help="Stop where the output cannot have every value."),
    ]
    return apply(options, function)
