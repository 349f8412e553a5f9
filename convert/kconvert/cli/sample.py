"""`kconvert sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kconvert.cli.options import Command, apply, links_option, location, location_or_gguf, output_options
from kconvert.cli.running import carry_out, pinned

if TYPE_CHECKING:
    from kconvert.planning.plan import Plan
    from kconvert.targets.sample import SampleRecipe

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
    return apply(
        [click.option(f"--{name}", type=click.IntRange(0), help=text) for name, text in DIMENSIONS.items()], function
    )


@click.command()
@click.argument("destination", metavar="DST", type=location)
@click.option("--like", default="kimi-k2-thinking", show_default=True, help="The manifest whose shape it takes.")
@click.option("--from", "origin", type=location_or_gguf, metavar="SRC", help="Cut real weights out of SRC instead.")
@click.option("--scatter", is_flag=True, help="Put the tensors of one weight into different shards.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the synthetic weights.")
@dimension_options
@links_option
@output_options
def sample(
    destination: str, like: str, origin: str | None, scatter: bool, seed: int, shard_size: int, **options: Any
) -> None:
    """Write a small checkpoint to DST: synthetic in a model's exact shape, or the first layers and experts of SRC,
    in the form that SRC has: MLX's and GGUF, too. Of SRC the vocabulary and all other sizes stay; tables of experts by token,
    where experts are left out, are made up, and that is said.

    Sizes that are not given stay the model's own, so without any this writes 594 GB. But --kv-rank of a model in blocks of FP8
    is 448 once any other is given: transformers reads no block that is cut off, as the model's own are.

    \b
    Example: kconvert sample ./tiny --layers 3 --experts 8 --hidden 512 --vocab 1024
    """
    from kconvert.planning.plan import repeatable
    from kconvert.targets.sample import SampleRecipe, plan_synthetic

    given = {name.replace("-", "_"): options.pop(name.replace("-", "_")) for name in DIMENSIONS}
    sizes = {name: size for name, size in given.items() if size is not None}
    recipe = SampleRecipe(like, sizes, shard_size, scatter, seed)
    if origin is not None and click.get_current_context().get_parameter_source("like") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--from takes the model that SRC has; leave out --like")
    if origin is None:
        plan = repeatable(plan_synthetic(recipe), plan_synthetic, recipe)
    else:
        plan = _cut(origin, pinned(origin, destination, None, **options), recipe)
    carry_out(plan, destination, **options)


def _cut(origin: str, revision: str | None, recipe: SampleRecipe) -> Plan:
    from kconvert.address import anywhere, open_stored
    from kconvert.planning.plan import repeatable
    from kconvert.targets.sample import plan_cut

    checkpoint = open_stored(origin, revision)
    return repeatable(plan_cut(checkpoint, recipe), _cut, anywhere(origin), checkpoint.commit or revision, recipe)
