"""The kind of output that a recipe in a file makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.targets.base import EXPERTS, Declared, Target
from kconvert.targets.hf import beside_modelopt, compressed_fp8, int4, int8, mx, nvfp4
from kconvert.targets.mixed.rules import ENCODINGS, KEEP, MODELOPT, RECORD, Matcher, Mix, matcher

if TYPE_CHECKING:
    from kconvert.models.model import Model, Weight

# The table of an output in one encoding alone, by the first word of the encoding's label.
TABLES: Mapping[str, Callable[[Any, list[str], list[str]], dict[str, Any]]] = {
    "nvfp4": nvfp4,
    "fp8": compressed_fp8,
    "mxfp4": mx,
    "mxfp8": mx,
    "int4": int4,
    "int8": int8,
}


NOTHING = Mix("", ())


@dataclass(frozen=True, slots=True)
class MixedTarget(Target):
    """`choices` are the rules of `mix`, and the format of each by what else was asked for; None: the one that a weight has."""

    mix: Mix = NOTHING
    choices: tuple[tuple[Matcher, Format | None], ...] = ()

    def choice(self, weight: Weight) -> Format | None:
        return next((format or weight.format for fits, format in self.choices if fits(weight)), None)

    def leaves(self, weight: Weight) -> bool:
        return next((format is None for fits, format in self.choices if fits(weight)), False)

    def check(self, model: Model) -> None:
        from kconvert.targets.mixed.checks import check_mix
        from kconvert.targets.mixed.kept import check_deepseek_v4, is_deepseek_v4

        check_mix(self.mix, model)
        if is_deepseek_v4(model) and any(format is None for _, format in self.choices):
            check_deepseek_v4((weight, self.choice(weight), self.leaves(weight)) for weight in model.weights)

    def said(self, model: Model, weights: Sequence[Weight]) -> Sequence[Declared]:
        from kconvert.targets.mixed.kept import declared

        return declared(model, weights, self.mix.layout)

    def notes(self, model: Model) -> list[str]:
        from kconvert.targets.mixed.checks import idle_rules

        return [*idle_rules(self.mix, model)]

    @property
    def words(self) -> str:
        rules = ", ".join(f"{selector} = {word}" for selector, word in self.mix.rules)
        return f"{self.mix.layout}: {rules}"

    @property
    def records(self) -> Mapping[str, bytes]:
        return {RECORD: self.mix.text.encode()}

    def declare(
        self,
        format: Format,
        quantised: Mapping[Format, Sequence[str]],
        others: Sequence[str],
        left: Sequence[Declared] = (),
    ) -> dict[str, Any]:
        from kconvert.dialects import compressed_tensors, fp8, modelopt

        if self.mix.layout != MODELOPT:
            tables = [(TABLES[_word(format)](format, list(names), []), names) for format, names in quantised.items()]
            return compressed_tensors.mixed_table([*tables, *left], others)
        for said, _ in left:
            if said.get("quant_method") in fp8.METHODS:
                return {**said, "moe_quant_algo": "NVFP4"}
        algorithms = [(modelopt.entry(_algorithm(format)), names) for format, names in quantised.items()]
        return modelopt.mixed_table([*algorithms, *left], others)


def mixed_target(mix: Mix, by_rule: Callable[[Format], Format]) -> MixedTarget:
    """The output of a recipe, whose formats go by what else was asked for."""
    formats: dict[str, Format | None] = {word: by_rule(format) for word, format in ENCODINGS[mix.layout].items()}
    formats[KEEP] = None
    choices = tuple((matcher(selector), formats[word]) for selector, word in mix.rules)
    beside = beside_modelopt if mix.layout == MODELOPT else None
    return MixedTarget(Dense("BF16"), EXPERTS, table=TABLES["nvfp4"], beside=beside, mix=mix, choices=choices)


def _word(format: Format) -> str:
    return format.label.partition(" ")[0]


def _algorithm(format: Format) -> str:
    """What ModelOpt calls it."""
    return "FP8" if isinstance(format, Fp8) else "NVFP4"
