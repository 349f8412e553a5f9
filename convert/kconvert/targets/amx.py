"""Plans that write AMX weights: from the routed experts of a checkpoint, or from AMX weights for other NUMA nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import without_quantization
from kconvert.errors import KconvertError, counted
from kconvert.formats import Format
from kconvert.formats.engines.amx import METHODS, Amx, AmxCodes, AmxScales
from kconvert.formats.packed import Packed
from kconvert.models.amx import PROJECTIONS, RECORD, AmxModel, kt_path, weight_name
from kconvert.models.experts import Experts, rest_of, routed_experts
from kconvert.models.model import Model, Weight, format_counts, natural_key, refuse_undecoded
from kconvert.planning.containers import FORMS, METADATA, Apart, Container, Safetensors, json_bytes
from kconvert.planning.plan import Output, Plan
from kconvert.planning.steps import Step, Transcode, copy_of, count_steps
from kconvert.targets.base import DEFAULT_SHARD_SIZE, SCALES, origin_of

MAX_NUMA = 64
# Measured, see docs/BENCHMARKS.md: for four bits the best scale has half the error of amax's, for eight bits the same.
DEFAULT_SCALES = {4: "mse", 8: "amax"}


@dataclass(frozen=True, slots=True)
class AmxRecipe:
    """`method` is one of METHODS, `form` one of FORMS; `scales` "" stands for the default of the method.

    `with_rest`: all other tensors are copied, under the names that kt-kernel's converter gives them.
    """

    method: str
    numa: int
    scales: str = ""
    form: str = "safetensors"
    with_rest: bool = False
    shard_size: int = DEFAULT_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise KconvertError(f"there is no method {self.method!r}; there are {', '.join(METHODS)}")
        if self.numa < 1:
            raise KconvertError(f"{self.numa} NUMA nodes are not possible")
        if self.form not in FORMS:
            raise KconvertError(f"there is no form {self.form!r}; there are {', '.join(FORMS)}")
        if self.form == "kt" and self.with_rest:
            raise KconvertError("a tree of .kt files holds experts only; leave out --with-rest, or write safetensors")
        if self.shard_size <= 0:
            raise KconvertError(f"a shard size of {self.shard_size} bytes is not possible; the default is 5GB")
        # The default goes by its name, so that naming it makes the same plan.
        object.__setattr__(self, "scales", self.scales or DEFAULT_SCALES[self.bits])
        if self.scales not in SCALES:
            raise KconvertError(f"there are no scales by {self.scales!r}; there are {', '.join(SCALES)}")

    @property
    def bits(self) -> int:
        return METHODS[self.method]


def plan_repack(model: Model, recipe: AmxRecipe) -> Plan:
    """Plan the routed experts of `model` as AMX weights; KconvertError when they cannot be split as the recipe says."""
    experts = routed_experts(model)
    check_numa(recipe.bits, recipe.numa, experts.hidden, experts.intermediate)
    drafts: list[Step] = [_repacked(weight, recipe) for weight in experts.weights]
    drafts.sort(key=lambda draft: natural_key(draft.outputs[0][0]))
    if recipe.with_rest:
        refuse_undecoded(model)
        drafts += [copy_of(item.tensor, below=item.below) for item in rest_of(model)]
    record = _record(recipe, experts, model.checkpoint.name)
    sources = [tensor for weight in experts.weights for tensor in weight.tensors]
    facts = {
        "source": model.checkpoint.name,
        "manifest": model.manifest.name,
        "weights": dict(format_counts(experts.weights)),
        "read_bytes": sum(tensor.nbytes for tensor in sources),
        "notes": list(_advice(experts, recipe)),
    }
    checkpoint = model.checkpoint if recipe.with_rest else replace(model.checkpoint, side_files={})
    parameters = sum(weight.rows * weight.cols for weight in experts.weights)
    return _plan(checkpoint, recipe, drafts, record, facts, parameters)


def plan_resplit(model: AmxModel, numa: int, form: str, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Plan the same codes and scales for `numa` NUMA nodes; KconvertError where that is not exact.

    Gate and up are cut by rows, each with its scale, so they go to any number. Down is cut by columns, and a row has one
    scale in each shard: a shard can be cut further, but two cannot become one.
    """
    with_rest = bool(model.rest) and form != "kt"
    recipe = AmxRecipe(model.method, numa, form=form, with_rest=with_rest, shard_size=shard_size)
    check_numa(model.bits, numa, model.hidden, model.intermediate)
    if numa % model.numa:
        possible = [n for n in possible_numa(model.bits, model.hidden, model.intermediate) if n % model.numa == 0]
        raise KconvertError(
            f"{model.checkpoint.root} is packed for {counted(model.numa, 'NUMA node')}; gate and up could be split for {numa}, "
            f"but a row of down has a scale in each shard, and shards can only be cut further, into {_listed(possible)}; pack "
            f"the original checkpoint for {numa}"
        )
    drafts: list[Step] = [step for weight in model.weights for step in _resplit(weight, numa)]
    drafts += [copy_of(tensor) for tensor in model.rest if with_rest]
    experts = Experts(model.weights, model.hidden, model.intermediate, model.layers)
    record = {
        **_record(recipe, experts, model.checkpoint.name),
        "quantised_for": model.quantised_for,
        "scales": model.record.get("scales", "unknown"),
        **{key: model.record[key] for key in ("source", "revision") if key in model.record},
    }
    facts = {
        "source": model.checkpoint.name,
        "weights": dict(format_counts(model.weights)),
        "read_bytes": model.checkpoint.nbytes,
        "dropped": [tensor.name for tensor in model.rest if not with_rest],
        "notes": [],
    }
    parameters = sum(weight.rows * weight.cols for weight in model.weights)
    side_files = {name: size for name, size in model.checkpoint.side_files.items() if name != RECORD}
    return _plan(replace(model.checkpoint, side_files=side_files), recipe, drafts, record, facts, parameters)


def _plan(
    checkpoint: Checkpoint,
    recipe: AmxRecipe,
    drafts: Sequence[Step],
    record: Mapping[str, Any],
    facts: dict[str, Any],
    parameters: int,
) -> Plan:
    config = {
        **without_quantization(checkpoint.config),  # which is not how these weights are quantised
        # What KTransformers' `kt` command shows of a model.
        "amx_quantization": {"converted": True, "method": f"int{recipe.bits}", "numa_count": recipe.numa},
    }
    asked = {"to": recipe.method, "numa": recipe.numa, "scales": record["scales"], "parameters": parameters}

    def all_facts(steps: Sequence[Step]) -> dict[str, Any]:
        return {**facts, **asked, **count_steps(steps), "left_out": list(checkpoint.left_out)}

    container = _container(recipe, record)
    texts = {RECORD: json_bytes(record)}
    return Output(repr(recipe), checkpoint, drafts, container, config, parameters, all_facts, texts).plan()


def _container(recipe: AmxRecipe, record: Mapping[str, Any]) -> Container:
    """The files of the recipe's form; `record` goes into every header, where there are any."""
    if recipe.form == "kt":
        return Apart(lambda name, nbytes: kt_path(name, recipe.bits, nbytes))
    metadata = {**METADATA, **{key: str(value) for key, value in record.items()}}
    return Safetensors(recipe.shard_size, metadata=metadata)


def possible_numa(bits: int, hidden: int, intermediate: int) -> list[int]:
    """The numbers of NUMA nodes that the experts can be split for; none where they have no values."""
    block = Amx(bits).block
    fitting = [n for n in range(1, MAX_NUMA + 1) if not (hidden % block or intermediate % (block * n))]
    return fitting if hidden and intermediate else []


def check_numa(bits: int, numa: int, hidden: int, intermediate: int) -> None:
    """KconvertError, with what would work, when shards would not be whole blocks."""
    if numa in possible_numa(bits, hidden, intermediate):
        return
    other = {4: 8, 8: 4}[bits]
    works = {f"AMXINT{n}": possible_numa(n, hidden, intermediate) for n in (bits, other)}
    advice = " and ".join(f"{method} with --numa {_listed(numbers)}" for method, numbers in works.items() if numbers)
    raise KconvertError(
        f"AMXINT{bits} for {numa} NUMA nodes needs an intermediate size that is a multiple of {Amx(bits).block} x {numa} and a "
        f"hidden size that is one of {Amx(bits).block}; the experts' are {intermediate} and {hidden}, which "
        + (f"would do for {advice}" if advice else "no method can pack")
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "nothing"


def _repacked(weight: Weight, recipe: AmxRecipe) -> Transcode:
    projection = weight.role.partition(".")[2]
    assert weight.layer is not None
    assert weight.expert is not None
    target = Amx(recipe.bits, recipe.numa, PROJECTIONS[projection], mse=recipe.scales == "mse")
    output = weight_name(weight.layer, projection, weight.expert)
    return Transcode(weight.name, weight.rows, weight.cols, weight.format, weight.tensors, target, output=output)


def _resplit(weight: Weight, numa: int) -> Iterator[Transcode]:
    """The codes and the scales by themselves, so that neither is computed anew."""
    ours = weight.format
    assert isinstance(ours, Amx)
    theirs = replace(ours, numa=numa)
    codes = AmxCodes(ours), weight.tensors[::2], AmxCodes(theirs)
    scales = AmxScales(ours, weight.cols), weight.tensors[1::2], AmxScales(theirs, weight.cols)
    yield Transcode(weight.name, weight.rows, weight.cols, *codes)
    yield Transcode(weight.name, weight.rows, numa if ours.split == "cols" else 1, *scales)


def _record(recipe: AmxRecipe, experts: Experts, source: str) -> dict[str, Any]:
    """What the loader cannot find out: goes into kconvert.json and into the header of every file."""
    origin = origin_of(source)
    return {
        "kconvert": origin.pop("kconvert"),
        "method": recipe.method,
        "numa": recipe.numa,
        "scales": recipe.scales,
        "quantised_for": recipe.numa,
        "hidden_size": experts.hidden,
        "moe_intermediate_size": experts.intermediate,
        "experts": max(experts.layers.values()),
        "layers": f"{min(experts.layers)}-{max(experts.layers)}",
        **origin,
    }


def _advice(experts: Experts, recipe: AmxRecipe) -> Iterator[str]:
    """What stays out, and what somebody who repacks native INT4 should know."""
    if not recipe.with_rest:
        yield "only the routed experts are written; --with-rest copies all other tensors, too"
    if all(_is_rawint4(weight.format) for weight in experts.weights):
        yield "KTransformers runs this INT4 as it is, with --kt-method RAWINT4: that needs no conversion and loses nothing"
        yield (
            "AMXINT4 is a lossy re-quantisation of it: the scales of 32 values become one scale a row; AMXINT8 loses a tenth "
            "of that in twice the space"
            if recipe.bits == 4
            else "AMXINT8 re-quantises it: the scales of 32 values become one scale a row"
        )


def _is_rawint4(format: Format) -> bool:
    """Whether KTransformers' RAWINT4 reads it; other sizes of groups it would take for 32, silently."""
    if not isinstance(format, Packed) or format.ordered or not format.symmetric:
        return False
    return (format.bits, format.group_size, format.scale_dtype, format.stack) == (4, 32, "BF16", None)
