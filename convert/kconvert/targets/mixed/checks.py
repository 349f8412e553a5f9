"""Whether a recipe makes sense for a model: rules that mean something there, and one encoding for what engines fuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kconvert.errors import KconvertError
from kconvert.formats.engines.heads import Heads
from kconvert.models.roles import fusion
from kconvert.targets.mixed.rules import BF16, KEEP, Mix, is_glob, is_within, matcher

if TYPE_CHECKING:
    from kconvert.models.model import Model, Weight

# First words of roles that a model may have.
ROLES = frozenset(
    {"expert", "shared", "dense", "attention", "linear", "other", "lm_head", "embedding", "router", "vision"}
    | {"projector", "mtp"}
)
EXPERT = "expert"
EXPERTS = ".experts."


def check_mix(mix: Mix, model: Model) -> None:
    """KconvertError for a rule that can mean nothing in this model, and for weights that engines take as one but which get
    several encodings."""
    roles = {weight.role for weight in model.weights}
    for selector, _ in mix.rules:
        fits = matcher(selector)
        if is_glob(selector):
            if not any(fits(weight) for weight in model.weights):
                longest = max((weight.name for weight in model.weights), key=len, default="")
                raise KconvertError(
                    f"{mix.whose} {selector!r} matches no weight; globs are of whole names, of which {longest!r} is one"
                )
        elif selector not in ROLES and not any(is_within(role, selector) for role in roles):
            raise KconvertError(
                f"{mix.whose} {selector!r} is no role of this model ({', '.join(sorted(roles))}), and no glob either"
            )
    _check_order(mix, model)


def idle_rules(mix: Mix, model: Model) -> Iterator[str]:
    """A sentence for each rule about a role that models have, but not this one."""
    roles = {weight.role for weight in model.weights}
    for selector, word in mix.rules:
        if not is_glob(selector) and not any(is_within(role, selector) for role in roles):
            yield f"{mix.whose} {selector} = {word} has no effect, as the model has no weight in this role"


def _check_order(mix: Mix, model: Model) -> None:
    """KconvertError for a rule that those before it leave nothing, and for fused weights that get several encodings."""
    rules = [(selector, word, matcher(selector)) for selector, word in mix.rules]
    fitting, counting = set[str](), set[str]()
    first: dict[object, tuple[str, str, str]] = {}
    for weight in model.weights:
        hits = [(selector, word) for selector, word, fits in rules if fits(weight)]
        fitting.update(selector for selector, _ in hits)
        counting.update(selector for selector, _ in hits[:1])
        rule, word = hits[0] if hits else ("", *BF16)
        if word == KEEP and isinstance(weight.format, Heads):
            raise KconvertError(
                f"weight {weight.name!r} lies by heads, as MLX alone has it, and cannot stay; give it bf16"
            )
        for group, together in _groups(weight):
            name, other, by = first.setdefault(group, (weight.name, word, rule))
            if word != other:
                raise KconvertError(
                    f"the recipe makes {name!r} {other} ({_by(by)}) and {weight.name!r} {word} ({_by(rule)}), {together}; "
                    "give both the same encoding"
                )
    if shadowed := [selector for selector, _ in mix.rules if selector in fitting - counting]:
        raise KconvertError(
            f"{mix.whose} {shadowed[0]!r} never counts, as rules above it fit the same weights; move it above them"
        )
    if not fitting:
        named = ", ".join(selector for selector, _ in mix.rules)
        raise KconvertError(
            f"{model.checkpoint.root} has no weight that {mix.option or 'the recipe'} names (it names {named})"
        )


def _groups(weight: Weight) -> Iterator[tuple[object, str]]:
    """What the weight has in common with others that get its encoding too, and why they do."""
    if (group := fusion(weight.role, weight.name)) is not None:
        yield group, "which engines fuse into one matrix"
    if weight.role.partition(".")[0] == EXPERT:
        around = weight.name.partition(EXPERTS)[0] if EXPERTS in weight.name else weight.layer
        yield (EXPERT, around), "but engines have one encoding for all experts of a layer"


def _by(rule: str) -> str:
    return f"by its rule {rule!r}" if rule else "as no rule names it"
