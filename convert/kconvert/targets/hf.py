"""The output that transformers and serving engines read: safetensors shards, an index, and config.json in its dialect."""

from __future__ import annotations

from collections.abc import Iterator

from kconvert.checkpoint.source import Tensor
from kconvert.models.model import Model, Weight, format_counts, natural_key, refuse_undecoded
from kconvert.models.sorting import Plain
from kconvert.planning.containers import Safetensors
from kconvert.planning.plan import Output, Plan
from kconvert.planning.steps import Step, Transcode, copy_of, count_steps, place_of
from kconvert.targets.recipe import Recipe


def make_plan(model: Model, recipe: Recipe) -> Plan:
    """Plan the conversion of `model`; KconvertError when the recipe does not fit it."""
    refuse_undecoded(model.select(recipe.include, recipe.exclude))
    recipe.check_source(model)
    model = model.select(recipe.include, recipe.exclude)
    drafts = tuple(_drafts(model, recipe))
    facts = {
        "source": model.checkpoint.name,
        "manifest": model.manifest.name,
        "to": recipe.to,
        **({"layout": recipe.layout} if recipe.layout else {}),
        **({"scales": recipe.scales} if recipe.scales != "amax" else {}),
        "parameters": model.parameters,
        "weights": dict(format_counts(model.weights)),
        "read_bytes": sum(tensor.nbytes for weight in model.weights for tensor in weight.tensors)
        + sum(plain.tensor.nbytes for plain in model.plain),
        **count_steps(drafts),
        "dropped": [tensor.name for tensor in _left_behind(model, recipe)],
        "left_out": list(model.checkpoint.left_out),
    }
    container = Safetensors(recipe.shard_size)
    config = recipe.config(model)
    return Output(repr(recipe), model.checkpoint, drafts, container, config, model.parameters, facts).plan()


def _left_behind(model: Model, recipe: Recipe) -> Iterator[Tensor]:
    """What describes activations: it goes along only where a weight's codes are copied as they are."""
    yield from model.dropped
    for weight in model.weights:
        if weight.companions and (not weight.format.quantised or recipe.target(weight) is not None):
            yield from weight.companions


def _drafts(model: Model, recipe: Recipe) -> Iterator[Step]:
    """A step without places for each weight and tensor, in natural order of the output's names."""
    items: list[Weight | Plain] = [*model.weights, *model.plain]
    items.sort(key=lambda item: natural_key(item.name if isinstance(item, Weight) else item.tensor.name))
    for item in items:
        if isinstance(item, Plain):
            yield copy_of(item.tensor)
            continue
        target = recipe.target(item)
        if target is None:
            yield from map(copy_of, item.copied)
        else:
            reads = tuple(map(place_of, item.tensors))
            yield Transcode(item.name, item.rows, item.cols, item.format, reads, target)
