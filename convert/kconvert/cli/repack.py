"""`kconvert repack-amx`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kconvert.cli.options import links_option, location, output_options, revision_option
from kconvert.cli.running import carry_out, pinned
from kconvert.formats.engines.amx import METHODS
from kconvert.planning.containers import FORMS
from kconvert.targets.base import SCALES

if TYPE_CHECKING:
    from kconvert.planning.plan import Plan
    from kconvert.targets.amx import AmxRecipe


@click.command("repack-amx")
@click.argument("paths", metavar="[SRC] DST", nargs=-1, required=True, type=location)
@click.option("--method", type=click.Choice(list(METHODS)), help="Bits of the codes; needed with SRC.")
@click.option("--numa", required=True, type=click.IntRange(1), help="NUMA nodes of the machine that will serve.")
@click.option(
    "--scales",
    type=click.Choice(SCALES),
    help="amax: kt-kernel's bytes; mse: least squared error [default: mse for AMXINT4, amax for AMXINT8].",
)
@click.option("--format", "form", type=click.Choice(FORMS), default="safetensors", show_default=True, help="Files.")
@click.option("--with-rest", is_flag=True, help="Also copy what belongs to no routed expert.")
@click.option("--from-amx", type=location, metavar="DIR", help="Split AMX weights anew, in place of SRC; exact.")
@revision_option
@links_option
@output_options
def repack_amx(
    paths: tuple[str, ...],
    method: str | None,
    scales: str | None,
    from_amx: str | None,
    with_rest: bool,
    **options: Any,
) -> None:
    """Pack SRC's routed experts for KTransformers' AMX kernels, straight from any encoding that can be read.

    \b
    Example: kconvert repack-amx ./Kimi-K2-Instruct ./Kimi-K2-Instruct-AMXINT4-NUMA2 --method AMXINT4 --numa 2
    """
    if from_amx is not None:
        if len(paths) != 1 or method or scales or with_rest:
            raise click.UsageError(
                "--from-amx takes the place of SRC, --method, --scales and --with-rest; give DST only"
            )
        _resplit(from_amx, paths[0], **options)
    elif len(paths) != 2 or method is None:
        raise click.UsageError("give SRC, DST and --method, or DST and --from-amx")
    else:
        _repack(*paths, method=method, scales=scales or "", with_rest=with_rest, **options)


def _repack(
    source: str, destination: str, *, method: str, numa: int, revision: str | None, shard_size: int, **options: Any
) -> None:
    from kconvert.report.summary import launch_amx
    from kconvert.serving.place import place_of_plan
    from kconvert.targets.amx import AmxRecipe

    chosen = {name: options.pop(name) for name in ("scales", "form", "with_rest")}
    recipe = AmxRecipe(method, numa, shard_size=shard_size, **chosen)
    plan = _plan_repack(source, pinned(source, destination, revision, **options), recipe)
    carry_out(plan, destination, launch=launch_amx(place_of_plan(plan, destination), source), **options)


def _plan_repack(source: str, revision: str | None, recipe: AmxRecipe) -> Plan:
    import kconvert
    from kconvert.address import anywhere
    from kconvert.planning.plan import repeatable
    from kconvert.targets.amx import plan_repack

    model = kconvert.inspect(source, revision)
    commit = model.checkpoint.commit
    return repeatable(plan_repack(model, recipe), _plan_repack, anywhere(source), commit or revision, recipe)


def _resplit(
    source: str, destination: str, *, numa: int, form: str, shard_size: int, revision: str | None, **options: Any
) -> None:
    from kconvert.report.summary import launch_amx
    from kconvert.serving.place import place_of_plan

    if revision is not None:
        raise click.UsageError("--revision is for SRC; leave it out with --from-amx")
    plan = _plan_resplit(source, numa, form, shard_size)
    carry_out(plan, destination, launch=launch_amx(place_of_plan(plan, destination)), **options)


def _plan_resplit(source: str, numa: int, form: str, shard_size: int) -> Plan:
    from kconvert.address import anywhere
    from kconvert.models.amx import open_amx
    from kconvert.planning.plan import repeatable
    from kconvert.targets.amx import plan_resplit

    plan = plan_resplit(open_amx(Path(source)), numa, form, shard_size)
    return repeatable(plan, _plan_resplit, anywhere(source), numa, form, shard_size)
