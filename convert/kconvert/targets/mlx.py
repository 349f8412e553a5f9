"""A directory that mlx-lm loads: experts in stacks, kv_b by heads, and codes and scales as the source has them.

INT4 in groups becomes affine with the same words, MXFP4 and MXFP8 the modes of these names with the same bytes; all else that
is quantised becomes BF16. What mlx-lm would only rename as it loads keeps its name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from kconvert.dialects.mlx import mlx_config, module_of
from kconvert.errors import KconvertError, counted
from kconvert.formats import Format, parts_of
from kconvert.formats.base import check_form
from kconvert.formats.dense import Dense
from kconvert.formats.engines.heads import Heads
from kconvert.formats.engines.mlx import Affine, affine_of, by_heads, spelt
from kconvert.formats.engines.turns import Turns
from kconvert.formats.mx import Mx
from kconvert.formats.stacks import MxStack
from kconvert.models.experts import experts_in
from kconvert.models.mlx import KV_B
from kconvert.models.mlx import is_name as is_mlx
from kconvert.models.model import Model, Weight, natural_key
from kconvert.models.sorting import Plain
from kconvert.planning.containers import Safetensors, first_written
from kconvert.planning.plan import Output, Plan
from kconvert.planning.steps import Slot, Step, Transcode, copy_of
from kconvert.targets.base import WIDE, facts_of, read_bytes, refuse_loss
from kconvert.targets.recipe import Recipe

METADATA = {"format": "mlx"}
TOKENIZERS = frozenset(
    {"tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json"}
)  # one of which a model has
# The models that mlx-lm has a class for which reads what is written here (0.32.2); of bailing_hybrid that of Ling-3.
MODELS = frozenset(
    {"bailing_hybrid", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm_moe_dsa", "gpt_oss", "kimi_k2", "kimi_k25"}
    | {"kimi_k3", "minimax_m2", "minimax_m3_vl", "mixtral", "qwen3_moe", "qwen3_5_moe"}
)
ARCHITECTURES = {"bailing_hybrid": "BailingMoeV3ForCausalLM"}  # by which mlx-lm tells classes of one type apart
# What its classes want to find in config.json where transformers' have it by themselves.
WANTED: Mapping[str, Mapping[str, Any]] = {"bailing_hybrid": {"q_lora_rank": None}, "glm4_moe": {"rope_scaling": None}}

WIDE_NOTE = (
    "with F32 scales and biases mx.dequantize gives every product exactly; they take 32 bits a group more than in BF16"
)
NARROW_NOTE = (
    "with BF16 scales MLX rounds twice, bf16(bf16(scale * code) + bias), so 38% of all pairs of code and scale come out one "
    "rounding off; --scales f32 makes them exact"
)


def plan_mlx(model: Model, chosen: Model, recipe: Recipe) -> Plan:
    """The plan of a directory for mlx-lm; see targets.planner. KconvertError for a model that it has no class for."""
    kind = model.checkpoint.config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if kind not in MODELS or (architecture and model.checkpoint.config.get("architectures") != [architecture]):
        raise KconvertError(
            f"{model.checkpoint.root} is a {kind or 'model without a model_type'}, and mlx-lm 0.32.2 has no class that reads "
            f"such a model from what kconvert writes; it has for {', '.join(sorted(MODELS))}"
        )
    conversion = _Mlx(chosen, model, recipe)
    container = Safetensors(recipe.shard_size, metadata=METADATA)
    drafts = conversion.drafts()
    _check_effect(model, drafts)
    return Output(
        repr(recipe), chosen.checkpoint, drafts, container, conversion.config(), chosen.parameters, conversion.facts
    ).plan()


def _check_effect(model: Model, drafts: Sequence[Step]) -> None:
    """KconvertError when the output would be the source again."""
    there = model.checkpoint.tensors
    if not any(map(is_mlx, there)):
        return
    written = chain.from_iterable(first_written(drafts, set()))
    if all(
        name in there and (there[name].dtype, there[name].shape) == (dtype, shape) for name, dtype, shape in written
    ):
        raise KconvertError(
            f"{model.checkpoint.root} has every weight as mlx would write it; there is nothing to convert"
        )


@dataclass(frozen=True)
class _Mlx:
    """What becomes of `model`, which was chosen of `whole`."""

    model: Model
    whole: Model
    recipe: Recipe
    _formats: dict[tuple[int, int], Format] = field(default_factory=dict)

    @cached_property
    def layers(self) -> float:
        return self.model.layers

    def stays(self, item: Weight | Plain) -> bool:
        """Whether it is part of what mlx-lm loads, which the layers behind the last (MTP) are not."""
        return (item.layer is None or item.layer < self.layers) and not item.role.startswith("mtp")

    def format(self, weight: Weight) -> Format:
        """What spells a weight in the output."""
        key = id(weight.format), weight.cols
        if key not in self._formats:
            self._formats[key] = self._format(weight)
        return self._formats[key]

    def _format(self, weight: Weight) -> Format:
        source = weight.format
        if isinstance(source, Affine):
            return source
        if isinstance(source, Mx):
            return spelt(source)
        dtype = "F32" if self.recipe.scales == WIDE else "BF16"
        format = affine_of(source, weight.cols, dtype, self.recipe.require_exact) or (
            Dense("BF16") if source.quantised else source
        )
        if self.recipe.require_exact and isinstance(format, Dense):
            refuse_loss(weight.name, source, format)
        return format

    @cached_property
    def experts(self) -> Mapping[str, list[Weight]]:
        """The matrices of each stack in the order of the experts, by the module that it is."""
        found: dict[str, list[Weight]] = defaultdict(list)
        for weight in self.model.weights:
            if weight.expert is not None and self.stays(weight) and (name := module_of(weight.name)) != weight.name:
                found[name].append(weight)
        counts = experts_in(self.whole.weights)
        for name, weights in found.items():
            weights.sort(key=lambda weight: weight.expert or 0)
            first = weights[0]
            alike = all((w.rows, w.cols) == (first.rows, first.cols) for w in weights)
            if not alike or [weight.expert for weight in weights] != list(range(counts[first.layer, first.role])):
                raise KconvertError(
                    f"weight {first.name!r} lies with those of all other experts in one tensor {name!r}, but some of these are "
                    "not chosen, or of another shape; choose them all"
                )
        return found

    def stacked(self, weights: Sequence[Weight]) -> Format:
        """What spells all matrices of a stack: BF16 where the source has them in several encodings."""
        formats = {id(weight.format): self.format(weight) for weight in weights}
        first, *others = formats.values()
        return first if all(other == first for other in others) else Dense("BF16")

    def drafts(self) -> list[Step]:
        """Steps without places, in natural order of the output's names."""
        groups = [(name, [*self._stack(name, weights)]) for name, weights in self.experts.items()]
        stacked = {weight.name for weights in self.experts.values() for weight in weights}
        for weight in self.model.weights:
            if weight.name not in stacked and self.stays(weight):
                groups.append((weight.name, [*self._steps(weight)]))
        groups += [(p.tensor.name, [*self._plain(p)]) for p in self.model.plain if self.stays(p)]
        groups.sort(key=lambda group: natural_key(group[0]))
        return [step for _, steps in groups for step in steps]

    def _stack(self, name: str, weights: Sequence[Weight]) -> Iterator[Step]:
        format = self.stacked(weights)
        for index, weight in enumerate(weights):
            yield from self._spell(weight, format, name, Slot(name, index, len(weights), 1, bare=False))

    def _steps(self, weight: Weight) -> Iterator[Step]:
        if isinstance(weight.format, MxStack):
            yield from _take_turns(weight)
        elif isinstance(weight.format, Heads) or weight.role == "attention.kv_b":
            yield from self._by_heads(weight)
        else:
            try:
                check_form(weight.format, weight.rows)
            except ValueError as error:
                raise KconvertError(f"weight {weight.name!r} {error}") from None
            yield from self._spell(weight, self.format(weight), weight.name, None)

    def _spell(self, weight: Weight, format: Format, name: str, slot: Slot | None) -> Iterator[Step]:
        """The weight in this format, as `name` or a matrix of the stack."""
        rows, cols, source = weight.rows, weight.cols, weight.format
        output = "" if name == weight.name else name
        if format == source or (isinstance(source, Mx) and isinstance(format, Mx)):
            for part, tensor in zip(parts_of(format, rows, cols), weight.tensors, strict=False):
                yield copy_of(tensor._replace(name=part.tensor_of(name), dtype=part.dtype), part.shape, slot)
        else:
            yield Transcode(weight.name, rows, cols, source, weight.tensors, format, (), output, slot)

    def _by_heads(self, weight: Weight) -> Iterator[Step]:
        if isinstance(weight.format, Heads):
            yield from map(copy_of, weight.tensors)
            return
        names = self.model.manifest.bind(self.model.checkpoint.config)
        format = by_heads(names.size("nope"), names.size("v_head"), Dense("BF16"), Dense("BF16"))
        output = weight.name.removesuffix(f".{KV_B}")
        yield Transcode(weight.name, weight.rows, weight.cols, weight.format, weight.tensors, format, (), output)

    def _plain(self, plain: Plain) -> Iterator[Step]:
        """A tensor as it is; gpt-oss's biases of experts as their matrices."""
        tensor = plain.tensor
        if plain.role == "expert.gate_up.bias":
            stem, rows = tensor.name.removesuffix(".gate_up_proj_bias"), tensor.shape[0] * tensor.shape[1]
            dense = Dense(tensor.dtype)
            turns = Turns(dense, tensor.shape[0], ("gate_proj.bias", "up_proj.bias"), flat=True)
            yield Transcode(tensor.name, rows, 1, dense, (tensor,), turns, (), stem)
        elif plain.role == "expert.down.bias":
            yield copy_of(tensor._replace(name=tensor.name.removesuffix("_bias") + ".bias"), below=plain.below)
        else:
            yield copy_of(tensor, below=plain.below)

    def config(self) -> dict[str, Any]:
        """config.json of the output."""
        modules: dict[str, Format] = {name: self.stacked(weights) for name, weights in self.experts.items()}
        for weight in self.model.weights:
            if isinstance(weight.format, MxStack):
                stem, _, last = weight.name.rpartition(".")
                words = ("down_proj",) if last == "down_proj" else ("gate_proj", "up_proj")
                modules |= dict.fromkeys((f"{stem}.{word}" for word in words), spelt(Mx(4)))
            elif isinstance(weight.format, Heads):
                stem = weight.name.removesuffix(KV_B)
                modules |= {f"{stem}{piece.name}": piece.format for piece in weight.format.pieces}
            elif self.stays(weight) and weight.expert is None and weight.role != "attention.kv_b":
                modules[weight.name] = self.format(weight)
        told = {name: kind for name, format in modules.items() if (kind := _kind(format)) is not None}
        config = self.model.checkpoint.config
        return {**WANTED.get(str(config.get("model_type")), {}), **mlx_config(config, told)}

    def facts(self, steps: Sequence[Step]) -> dict[str, Any]:
        """What a user wants to know of the plan that has these steps."""
        model = self.model
        items: list[Weight | Plain] = [*model.weights, *model.plain]
        gone = [item for item in items if not self.stays(item)]
        left = [t for item in gone for t in (item.tensors if isinstance(item, Weight) else (item.tensor,))]
        asked = {"scales": WIDE} if self.recipe.scales == WIDE else {}
        dropped = (tensor.name for tensor in (*model.dropped, *left))
        notes = list(self._notes(steps))
        return facts_of(model, self.recipe.to, asked, steps, read_bytes(model), {}, dropped, notes)

    def _notes(self, steps: Sequence[Step]) -> Iterator[str]:
        """What MLX makes of it, and what is not the source's bytes."""
        made = Counter(type(step.target) for step in steps if isinstance(step, Transcode))
        if made[Affine]:
            yield "codes of INT4 and INT8 are the source's words, scales the source's values, biases computed without rounding"
            yield WIDE_NOTE if self.recipe.scales == WIDE else NARROW_NOTE
        if made[Heads]:
            yield f"kv_b of {counted(made[Heads], 'layer')} is split by heads and in part transposed; its values stay"
        if not TOKENIZERS & self.model.checkpoint.side_files.keys():
            yield "the source has no tokenizer, without which mlx-lm generates no text; put that of its release into the output"
        items: list[Weight | Plain] = [*self.model.weights, *self.model.plain]
        if not all(map(self.stays, items)):
            yield "mlx-lm does not load the layers that predict further tokens (MTP), so they stay behind"


def _kind(format: Format) -> tuple[str, int, int] | None:
    """Mode, bits and size of groups as a config.json has them."""
    if isinstance(format, Affine):
        return "affine", format.bits, format.group_size
    return (format.label, format.bits, format.group_size) if isinstance(format, Mx) else None


def _take_turns(weight: Weight) -> Iterator[Step]:
    """gpt-oss's stacks: the rows of gate_up apart, those of down as they are."""
    assert isinstance(weight.format, MxStack)
    stem, _, last = weight.name.rpartition(".")
    names = ("down_proj.{}",) if last == "down_proj" else ("gate_proj.{}", "up_proj.{}")
    turns = Turns(spelt(Mx(4)), weight.format.stack, names)
    yield Transcode(weight.name, weight.rows, weight.cols, weight.format, weight.tensors, turns, (), stem)
