"""The kind of output that a recipe in a file makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.targets.base import EXPERTS, Target
from kconvert.targets.hf import beside_modelopt, compressed_fp8, int4, int8, mx, nvfp4
from kconvert.targets.mixed.rules import ENCODINGS, MODELOPT, RECORD, Matcher, Mix, matcher

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
    """`choices` are the rules of `mix`, and the format of each by what else was asked for."""

    mix: Mix = NOTHING
    choices: tuple[tuple[Matcher, Format], ...] = ()

    def choice(self, weight: Weight) -> Format | None:
        return next((format for fits, format in self.choices if fits(weight)), None)

    def check(self, model: Model) -> None:
        self.mix.check(model)

    @property
    def words(self) -> str:
        rules = ", ".join(f"{selector} = {word}" for selector, word in self.mix.rules)
        return f"{self.mix.layout}: {rules}"

    @property
    def records(self) -> Mapping[str, bytes]:
        return {RECORD: self.mix.text.encode()}

    def declare(
        self, format: Format, quantised: Mapping[Format, Sequence[str]], others: Sequence[str]
    ) -> dict[str, Any]:
        from kconvert.dialects import compressed_tensors, modelopt

        if self.mix.layout == MODELOPT:
            return modelopt.mixed_table({_algorithm(format): names for format, names in quantised.items()}, others)
        tables = [(TABLES[_word(format)](format, list(names), []), names) for format, names in quantised.items()]
        return compressed_tensors.mixed_table(tables, others)


def mixed_target(mix: Mix, by_rule: Callable[[Format], Format]) -> MixedTarget:
    """The output of a recipe, whose formats go by what else was asked for."""
    formats = {word: by_rule(format) for word, format in ENCODINGS[mix.layout].items()}
    choices = tuple((matcher(selector), formats[word]) for selector, word in mix.rules)
    beside = beside_modelopt if mix.layout == MODELOPT else None
    return MixedTarget(Dense("BF16"), EXPERTS, table=TABLES["nvfp4"], beside=beside, mix=mix, choices=choices)


def _word(format: Format) -> str:
    return format.label.partition(" ")[0]


def _algorithm(format: Format) -> str:
    """What ModelOpt calls it."""
    return "FP8" if isinstance(format, Fp8) else "NVFP4"
