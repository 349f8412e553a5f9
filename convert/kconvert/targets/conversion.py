"""The plan of a conversion: which weight becomes what, which tensors are copied or left behind, and config.json."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from typing import Any

from kconvert.checkpoint.safetensors import Tensor
from kconvert.dialects import declare_dtype, quantization_tables, with_quantization
from kconvert.dialects.tables import EXPERTS_KEY, KEYS
from kconvert.errors import KconvertError
from kconvert.formats import Format, parts_of
from kconvert.formats.dense import Dense
from kconvert.formats.engines.heads import Heads
from kconvert.formats.fp8 import Fp8
from kconvert.models.mlx import is_name as is_mlx
from kconvert.models.model import Model, Weight, format_counts, natural_key
from kconvert.models.stacks import STACKED, Stack
from kconvert.models.unlisted import missing_lines
from kconvert.planning.containers import json_bytes
from kconvert.planning.plan import Output, Plan
from kconvert.planning.steps import Mate, Slot, Step, Transcode, copy_of
from kconvert.targets.base import (
    EXPERTS,
    HELD,
    POWERS,
    Change,
    Target,
    facts_of,
    is_linear_role,
    is_ragged,
    ragged_blocks,
    read_bytes,
    refuse_loss,
)
from kconvert.targets.mixed.fused import mates
from kconvert.targets.mixed.measured import all_measured, measured, notes, told, with_inputs
from kconvert.targets.recipe import Recipe


def plan_conversion(model: Model, chosen: Model, recipe: Recipe) -> Plan:
    """The plan of an output that has the `chosen` weights of the model one by one; see targets.planner."""
    Conversion(model, recipe).check()
    conversion = Conversion(chosen, recipe, model)
    container, config = conversion.target.container(recipe.shard_size), conversion.config()
    drafts = conversion.drafts()
    texts = conversion.texts(config)
    return Output(
        repr(recipe), chosen.checkpoint, drafts, container, config, chosen.parameters, conversion.facts, texts
    ).plan()


@dataclass(frozen=True)
class Conversion:
    """What a recipe makes of a model, which may be a choice from the `whole` of it."""

    model: Model
    recipe: Recipe
    whole: Model | None = None

    @cached_property
    def target(self) -> Target:
        """What is written, in blocks of the size that the model has them in where it keeps its own encoding for the rest."""
        target = self.recipe.target(self.model.manifest)
        if self._block and target.spares and isinstance(target.format, Fp8):
            return replace(target, format=replace(target.format, block=self._block))
        return target

    @cached_property
    def _activations(self) -> bool:
        """Whether config.json of compressed-tensors' NVFP4 will say that activations are quantised, too."""
        return all_measured((self.whole or self.model).weights, self.target)

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        """Of the model's FP8."""
        blocks = (scheme.block for scheme in self.model.quantization.schemes if scheme.format == "fp8")
        return next(filter(None, blocks), None)

    def check(self) -> None:
        """KconvertError when the checkpoint is not what the command's name says, or the output would be the source again."""
        model, recipe = self.model, self.recipe
        self.target.check(model)
        quantised = [weight for weight in model.weights if _is_encoded(weight)]
        if not quantised and recipe.source is None and self.target.roles is None and self._has_remains():
            return
        if not quantised and (recipe.source not in (None, "bf16") or self.target.roles is None):
            raise KconvertError(f"{model.checkpoint.root} holds no quantised weights; there is nothing to convert")
        for weight in quantised:
            if recipe.source and not weight.format.label.startswith(recipe.source):
                have = ", ".join(sorted(format_counts(quantised)))
                raise KconvertError(
                    f"{weight.tensors[0]} is {weight.format.label}, not {recipe.source} (the checkpoint holds {have}); "
                    f"use `kconvert convert --to {recipe.to}`"
                )
        self._check_effect(bool(quantised))

    def _has_remains(self) -> bool:
        """Whether something speaks of a quantisation that the weights do not have, or tensors have MLX's names:
        a copy without it is worth making."""
        checkpoint = self.model.checkpoint
        declared = any(quantization_tables(checkpoint.config)) or any(map(is_mlx, checkpoint.tensors))
        return declared or any(weight.companions for weight in self.model.weights)

    def _check_effect(self, has_quantised: bool) -> None:
        """KconvertError when the output would be the source again."""
        model, target = self.model, self.target
        root, what = model.checkpoint.root, f"{self.recipe.to} {self.recipe.layout}".strip()
        if target.roles is not None and target.roles != EXPERTS and model.manifest.accepts_any and not has_quantised:
            raise KconvertError(
                f"{root} is a {model.checkpoint.config.get('model_type') or 'model'} without a manifest, so which of its "
                f"matrices are Linears is not known; --to {self.recipe.to} --layout experts takes those that are experts by "
                "name"
            )
        decodes = target.roles is None and any(self.becomes(weight) for weight in model.weights)
        if not decodes and all(target.choice(weight) is None for weight in model.weights):
            whose = "a routed expert's" if target.roles == EXPERTS else "one of a Linear"
            lines = missing_lines(model) if model.manifest.accepts_any else ""
            raise KconvertError(f"{root} has no weight that {what} is for (by their names, none is {whose}){lines}")
        if all(self.becomes(weight) is None and self.name(weight) == weight.name for weight in model.weights):
            told = " (its scales are powers of two by what config.json says)" if self.recipe.scales == POWERS else ""
            raise KconvertError(f"{root} has every weight as {what} would write it{told}; there is nothing to convert")

    def encoding(self, weight: Weight) -> Format:
        """What spells this weight in the output."""
        return self._change(weight).encoding

    def becomes(self, weight: Weight) -> Format | None:
        """The encoding that this weight gets; None: its tensors are copied byte for byte."""
        change = self._change(weight)
        return change.encoding if change.is_other else None

    def _change(self, weight: Weight) -> Change:
        """What becomes of this weight, and of all that are like it."""
        choice = self.target.choice(weight)
        # To hash or compare formats would take longest of all.
        kind = weight.rows, weight.cols, id(weight.format), id(choice)
        change = self._changes.get(kind)
        if change is None:
            change = self._changes[kind] = Change.of(weight.format, self._encoding(weight, choice))
            if self.recipe.require_exact and not change.keeps_codes:
                refuse_loss(weight.name, weight.format, change.encoding)
        return change

    @cached_property
    def _changes(self) -> dict[tuple[int, int, int, int], Change]:
        return {}

    def _encoding(self, weight: Weight, choice: Format | None) -> Format:
        if choice is weight.format:
            return choice
        if choice is not None:
            return self._fit(choice, weight)
        if _is_encoded(weight) and not (self.target.spares and isinstance(weight.format, Fp8)):
            return self._fit(Dense("BF16"), weight)
        return weight.format

    def name(self, weight: Weight) -> str:
        """What the weight is called in the output."""
        if self.target.names is None or self.target.choice(weight) is None:
            return weight.name
        try:
            return self.target.names(weight)
        except ValueError as error:
            raise KconvertError(f"weight {weight.name!r} {error}") from None

    def _fit(self, format: Format, weight: Weight) -> Format:
        """The format for this weight."""
        try:
            return self._fitted(format, weight.format, weight.rows, weight.cols)
        except ValueError as error:
            raise KconvertError(f"weight {weight.name!r} {error}") from None

    @cached_property
    def _fitted(self) -> Callable[[Format, Format, int, int], Format]:
        """`Format.fit`, shared by weights of one shape; by this conversion alone, as equal formats may have other rules."""
        mse = self.recipe.scales == "mse"
        return cache(lambda format, source, rows, cols: format.fit(source, rows, cols, mse=mse))

    def drafts(self) -> Iterator[Step]:
        """A step without places for each weight and tensor, in natural order of the output's names."""
        weights, begin = self.model.weights, 0
        for plain in self.model.plain:  # few, and both are in natural order by themselves
            place = natural_key(plain.tensor.name)
            end = bisect(weights, place, lo=begin, key=lambda weight: natural_key(weight.name))
            yield from chain.from_iterable(map(self._steps, weights[begin:end]))
            yield copy_of(plain.tensor, below=plain.below)
            begin = end
        yield from chain.from_iterable(map(self._steps, weights[begin:]))

    def _steps(self, weight: Weight) -> Iterator[Step]:
        change, name, slot = self._change(weight), self.name(weight), self._slots.get(weight.name)
        if not change.is_other and name == weight.name:
            yield from (copy_of(tensor, slot=slot) for tensor in weight.copied)
        elif change.keeps_codes:
            parts = parts_of(change.encoding, weight.rows, weight.cols)
            for part, tensor in zip(parts, weight.tensors, strict=False):
                yield copy_of(tensor._replace(name=part.tensor_of(name), dtype=part.dtype), part.shape, slot)
            for tensor in weight.companions:
                yield copy_of(tensor._replace(name=name + tensor.name.removeprefix(weight.name)))
        else:
            shape, output = (weight.rows, weight.cols), name if name != weight.name else ""
            mates = self._mates[weight.name] if change.encoding.settles(weight.format) else ()
            source, tensors, target = with_inputs(weight, change.encoding, self._activations)
            yield Transcode(weight.name, *shape, source, tensors, target, (), output, slot, mates)

    @cached_property
    def _mates(self) -> Mapping[str, tuple[Mate, ...]]:
        """Those that decide together what each weight's encoding settles, by the weight's name."""
        weights = (self.whole or self.model).weights
        return mates(weight for weight in weights if self.encoding(weight).settles(weight.format))

    @cached_property
    def _slots(self) -> Mapping[str, Slot]:
        """The place of each weight that lies in a stack of the output, by the weight's name."""
        stacks = self.model.stacks if self.target.names is None else ()
        weights = {weight.name: weight for weight in self.model.weights} if stacks else {}
        slots: dict[str, Slot] = {}
        for stack in stacks:
            members = [weights[name] for name in stack.members if name in weights]
            if len(members) == len(stack.members) and self._stays_together(stack, members):
                count, width = len(members), stack.width
                slots.update(
                    (name, Slot(stack.name, index, count, width, stack.bare))
                    for index, name in enumerate(stack.members)
                )
        return slots

    def _stays_together(self, stack: Stack, members: list[Weight]) -> bool:
        """Whether the output has these weights in a stack: they are in one form that can be stacked, and not as they are in a
        source that has them apart."""
        first = members[0]
        format = self.encoding(first)
        if format.quantised and stack.plain:
            return False
        parts = parts_of(format, first.rows, first.cols)
        if not all(part.suffix in STACKED and len(part.shape) == 2 and part.every for part in parts):
            return False
        alike = all((m.rows, m.cols, self.encoding(m)) == (first.rows, first.cols, format) for m in members)
        is_apart = first.tensors[0].name in self.model.checkpoint.tensors
        return alike and not (is_apart and all(self.becomes(member) is None for member in members))

    def left_behind(self) -> Iterator[Tensor]:
        """What describes activations: it goes along only where a weight's codes are copied as they are."""
        yield from self.model.dropped
        for weight in self.model.weights:
            if weight.companions and not (weight.format.quantised and self._change(weight).keeps_codes):
                taken = measured(weight, self.encoding(weight), self._activations)
                yield from (tensor for tensor in weight.companions if tensor is not taken)

    def facts(self, steps: Sequence[Step]) -> dict[str, Any]:
        """What a user wants to know of the plan that has these steps."""
        recipe = self.recipe
        asked = {
            **({"layout": recipe.layout} if recipe.layout else {}),
            **({"recipe": self.target.words} if self.target.words else {}),
            **({"scales": recipe.scales} if recipe.scales != "amax" else {}),
        }
        dropped = (tensor.name for tensor in self.left_behind())
        is_cut = any(is_ragged(change.encoding, *kind[:2]) for kind, change in self._changes.items())
        told = ragged_blocks(self.model, self.encoding, offer=not self.target.spares) if is_cut else {}
        return facts_of(
            self.model, recipe.to, asked, steps, read_bytes(self.model), told, dropped, self._notes(steps) or None
        )

    def _notes(self, steps: Sequence[Step]) -> list[str]:
        """Which rules have no effect, and which weights get scales that are powers of two though nobody asked for them."""
        told = [*self.target.notes(self.model), *notes(steps)]
        if self.recipe.scales == POWERS:
            return told
        changed = (step for step in steps if isinstance(step, Transcode) and isinstance(step.target, Fp8))
        labels = dict.fromkeys(step.source.label for step in changed if step.target.may_have_powers)
        return told + [
            f"{label} becomes FP8 by scales that are powers of two, which keep its values" for label in labels
        ]

    def config(self) -> dict[str, Any]:
        """config.json of the output."""
        written = self.target.format.value_dtype
        config = declare_dtype(self.model.checkpoint.config, written, map(self.becomes, self.model.weights))
        if self.target.table is None:
            return config
        quantised, left, others = self._sorted()
        if not quantised and not left:
            return config
        spelt: dict[Format, list[str]] = defaultdict(list)
        for encoding, weights in quantised:
            spelt[told(encoding, self._activations)] += map(self.name, weights)
        said = self.target.said(self.model, left)
        format = told(self._declared(chain(left, *(weights for _, weights in quantised))), self._activations)
        table = self.target.declare(format, spelt, [*map(self.name, others), *self._plain_linears()], said)
        if self._block and self.target.spares:
            table["weight_block_size"] = list(self._block)
        experts = {} if self.target.experts is None else {EXPERTS_KEY: self.target.experts}
        if any(EXPERTS_KEY in had for had in quantization_tables(self.model.checkpoint.config)):  # as DeepSeek-V4.1
            return with_quantization(config, {**table, **experts})
        return {**with_quantization(config, table), **experts}

    def _sorted(self) -> tuple[list[tuple[Format, list[Weight]]], list[Weight], list[Weight]]:
        """The weights that config.json is to declare, by what spells them; those that stay, with what it said of them; and the
        others."""
        # By identity: to hash the format of each would take longest of all.
        quantised: dict[int, tuple[Format, list[Weight]]] = {}
        left, others = [], []
        for weight in self.model.weights:
            encoding = self.encoding(weight)
            if not encoding.quantised or (weight.role in HELD and self.target.choice(weight) is None):
                others.append(weight)
            elif self.target.leaves(weight):
                left.append(weight)
            else:
                quantised.setdefault(id(encoding), (encoding, []))[1].append(weight)
        return list(quantised.values()), left, others

    def texts(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """The files beside config.json that say what it says of the quantisation, or what was asked for."""
        table = config.get(KEYS[0])
        beside = {} if table is None or self.target.beside is None else self.target.beside(table)
        records = {**self.target.records, **self.target.origin(self.model)}
        return {**records, **{name: json_bytes(content) for name, content in beside.items()}}

    def _declared(self, weights: Iterable[Weight]) -> Format:
        """The encoding that config.json declares: with scales that are powers of two also where all that is in it had them."""
        target = self.target.format
        had_powers = all(type(w.format) is type(target) and w.format.may_have_powers for w in weights)
        return (target.with_powers() if had_powers else None) or target

    def _plain_linears(self) -> Iterator[str]:
        """Modules of matrices that are copied as they are, which an engine may take for Linears to be quantised."""
        for plain in self.model.plain:
            module, _, suffix = plain.tensor.name.rpartition(".")
            is_linear = is_linear_role(plain.role, self.model.checkpoint.config.get("model_type"))
            if suffix == "weight" and len(plain.tensor.shape) == 2 and is_linear:
                yield module


def _is_encoded(weight: Weight) -> bool:
    """Whether it is something else than a plain tensor of its own name, and no engine wants it to be."""
    return (weight.format.quantised or isinstance(weight.format, Heads)) and weight.role not in HELD
