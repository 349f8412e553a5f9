"""From a model and a recipe to a plan: most outputs are weight by weight, some have ways of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from kconvert.errors import KconvertError
from kconvert.formats.engines.turns import Turns
from kconvert.models.model import Model, refuse_undecoded
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Step
from kconvert.targets.conversion import Conversion, plan_conversion
from kconvert.targets.gguf.plan import check_gguf, plan_gguf
from kconvert.targets.mlx import plan_mlx
from kconvert.targets.recipe import Recipe

Planner: TypeAlias = Callable[[Model, Model, Recipe], Plan]

# What follows --to -> how that is planned, where it is not by its Target alone. Each takes the model, what of it was chosen
# by --include and --exclude, and a recipe whose layout is settled.
PLANNERS: Mapping[str, Planner] = {
    "gguf": plan_gguf,
    "mlx": plan_mlx,
}


def make_plan(model: Model, recipe: Recipe) -> Plan:
    """Plan the conversion of `model`; KconvertError when the recipe does not fit it."""
    recipe = recipe.settled(model.manifest)
    chosen = model.select(recipe.include, recipe.exclude)
    _check(chosen)
    return PLANNERS.get(recipe.to, plan_conversion)(model, chosen, recipe)


def outline(model: Model, recipe: Recipe) -> Plan | None:
    """The plan, or whether there is one: of GGUF None, as its tokenizer takes long to read. KconvertError as make_plan."""
    if recipe.to != "gguf":
        return make_plan(model, recipe)
    _check(model)
    check_gguf(model, recipe.settled(model.manifest))
    return None


def decoded(model: Model) -> Iterator[Step]:
    """What a conversion to BF16 consists of, without places, also where it would have nothing to convert."""
    _check(model)
    return Conversion(model, Recipe("bf16").settled(model.manifest)).drafts()


def _check(model: Model) -> None:
    """KconvertError where nobody can read the values."""
    refuse_undecoded(model)
    for weight in model.weights:
        if isinstance(weight.format, Turns):
            raise KconvertError(
                f"weight {weight.name!r} lies in {weight.tensors[0].file} as MLX has gpt-oss's experts, whose rows and biases "
                "no other engine finds there; convert the checkpoint that it was made from"
            )
