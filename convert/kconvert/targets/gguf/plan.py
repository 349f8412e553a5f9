"""The plan of a GGUF output: its tensors, its metadata, and what a user wants to know of them."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kconvert.errors import KconvertError, counted
from kconvert.formats import Format
from kconvert.formats.dtypes import BLOCKS
from kconvert.formats.engines.ggml import Q4_0, Q8_0, Integers
from kconvert.formats.engines.heads import Heads
from kconvert.formats.engines.kimi import Decay, Product
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.models.model import Model
from kconvert.planning.gguf import Gguf
from kconvert.planning.plan import Output, Plan
from kconvert.planning.steps import Copy, Step, Transcode
from kconvert.targets.base import facts_of, refuse_loss
from kconvert.targets.gguf.architectures import HAVE_DENSE, architecture_of, section_of, title_of
from kconvert.targets.gguf.fields import Fields
from kconvert.targets.gguf.metadata import add_hyperparameters
from kconvert.targets.gguf.tensors import Tensors
from kconvert.targets.gguf.vocabulary import add_vocabulary, check_tokenizer
from kconvert.targets.recipe import Recipe

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from gguf.gguf_writer import GGUFValue


def plan_gguf(model: Model, chosen: Model, recipe: Recipe) -> Plan:
    """The plan of GGUF files with the `chosen` weights of the model; KconvertError for what llama.cpp has no place for."""
    tensors = _tensors(model, chosen, recipe)
    writer = _hyperparameters(model, tensors)
    section = section_of(model)
    size = Fields(section, f"{model.checkpoint.root}/config.json").integer("vocab_size")
    add_vocabulary(writer, model.checkpoint, section, size)
    metadata: Mapping[str, GGUFValue] = writer.kv_data[0]
    container = Gguf(title_of(model), recipe.shard_size, metadata)
    checkpoint = replace(chosen.checkpoint, side_files={})

    def facts(steps: Sequence[Step]) -> dict[str, Any]:
        asked = {"rest": recipe.rest, "architecture": tensors.architecture}
        origins, read = _origins(steps), sum(_read_bytes(step) for step in steps)
        dropped = (*tensors.left_out, *(tensor.name for tensor in chosen.dropped))
        notes = list(_notes(steps, origins, tensors.left_out))
        return facts_of(chosen, recipe.to, asked, steps, read, {"tensors": dict(origins)}, dropped, notes)

    drafts = _exact(tensors.drafts(), tensors.rest) if recipe.require_exact else tensors.drafts()
    return Output(repr(recipe), checkpoint, drafts, container, {}, chosen.parameters, facts).plan()


def check_gguf(model: Model, recipe: Recipe) -> None:
    """KconvertError where the model has no such plan, by all but what its tokenizer's files hold, which takes long to read."""
    tensors = _tensors(model, model, recipe)
    deque(tensors.drafts(), maxlen=0)
    _hyperparameters(model, tensors)
    check_tokenizer(model.checkpoint, section_of(model))


def _tensors(model: Model, chosen: Model, recipe: Recipe) -> Tensors:
    """What becomes of the `chosen` tensors; KconvertError for a model that llama.cpp has no place for."""
    architecture = architecture_of(model)
    layers = Fields(section_of(model), f"{model.checkpoint.root}/config.json").integer("num_hidden_layers")
    format = recipe.target(model.manifest).format
    assert isinstance(format, Q4_0)
    _check_layers(model, architecture, layers)
    return Tensors(chosen, model, architecture, layers, format, Q8_0() if recipe.rest == "q8_0" else None)


def _exact(drafts: Iterable[Step], rest: Format | None) -> Iterator[Step]:
    """The steps; KconvertError for the first that rounds, be it to what the rest is to be."""
    for step in drafts:
        if isinstance(step, Transcode):
            asked = rest is not None and step.target.label.startswith(rest.label)
            refuse_loss(step.name, step.source, step.target, f"--rest {rest.label}" if asked and rest else "")
        yield step


def _check_layers(model: Model, architecture: str, layers: int) -> None:
    """KconvertError for layers without experts, where llama.cpp wants some in each."""
    dense = next((weight for weight in model.weights if weight.role.startswith("dense.")), None)
    if dense is not None and architecture not in HAVE_DENSE:
        raise KconvertError(
            f"{dense.tensors[0]} is of a layer without experts, which llama.cpp's {architecture} has not"
        )
    if not layers:
        raise KconvertError(f"{model.checkpoint.root}/config.json: num_hidden_layers is 0")


def _hyperparameters(model: Model, tensors: Tensors) -> GGUFWriter:
    """A writer with all metadata but the tokenizer's."""
    from gguf import GGUFWriter

    writer = GGUFWriter(None, tensors.architecture)
    add_hyperparameters(writer, model, tensors.architecture, tensors.layers, tensors.experts_type())
    return writer


def _read_bytes(step: Step) -> int:
    return step.nbytes if isinstance(step, Copy) else sum(part.nbytes for part in step.source_parts)


def _origins(steps: Sequence[Step]) -> Counter[str]:
    """How many of the source's tensors and weights are what in the output."""
    counts: Counter[str] = Counter()
    for step in steps:
        if isinstance(step, Copy):
            counts["the source's bytes"] += 1
        elif isinstance(step.source, Product) or isinstance(step.target, Decay):
            counts["computed of the source's values, as llama.cpp wants them"] += 1
        elif step.target.takes_codes(step.source) and not (
            isinstance(step.source, Integers) or isinstance(step.target, Heads)
        ):
            counts["the source's codes and scales, in another order"] += 1
        else:
            fate = step.target.fate(step.source)
            split = isinstance(step.target, Heads) and fate == "lossless"
            counts["the source's values, split and transposed" if split else _made(fate)] += 1
    return counts


def _made(fate: str) -> str:
    return "the source's values, in another type" if fate == "lossless" else "computed, and rounded"


def _notes(steps: Sequence[Step], counts: Mapping[str, int], left_out: Sequence[str]) -> Iterator[str]:
    said = (f"{count:,} {'is' if count == 1 else 'are'} {what}" for what, count in counts.items())
    yield "of the weights and tensors, " + "; ".join(said)
    heads = [step for step in steps if isinstance(step, Transcode) and isinstance(step.target, Heads)]
    if heads:
        yield f"kv_b of {counted(len(heads), 'layer')} is split by head into k_b, transposed, and v_b"
    yield from _spelt_out(steps)
    if left_out:
        yield (
            f"left out, as llama.cpp has no use for them or reads them from another file (towers, layers for drafting, a head "
            f"that is the embedding): {counted(len(left_out), 'weight')}, {left_out[0]!r} the first"
        )


def _spelt_out(steps: Sequence[Step]) -> Iterator[str]:
    """Codes that become plain numbers, by how the source has them."""
    spelt: dict[str, list[Transcode]] = defaultdict(list)
    for step in steps:
        if not isinstance(step, Transcode) or isinstance(step.target, Heads):
            continue
        if step.source.quantised and not step.target.takes_codes(step.source):
            spelt[step.source.label].append(step)
    for label, weights in spelt.items():
        if isinstance(weights[0].source, Nvfp4):
            why = (
                "llama.cpp computes this model without the global scales of their blocks, or they have columns that are no "
                f"multiple of {BLOCKS['NVFP4'][0]}"
            )
        else:
            why = "of such codes and scales kconvert makes no blocks of llama.cpp's"
        yield (
            f"{counted(len(weights), 'weight')} in {label} become{'s' * (len(weights) == 1)} {weights[0].target.label}, "
            f"{weights[0].name!r} the first: {why}"
        )
