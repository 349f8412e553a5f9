"""Small checkpoints for trials, tests and benchmarks: synthetic in the shape of a manifest, or cut out of a real one."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kconvert import formats
from kconvert.checkpoint.gguf_files import GgufCheckpoint
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import KconvertError, counted
from kconvert.formats import Format, parts_of
from kconvert.formats.base import Scheme
from kconvert.formats.dense import Dense
from kconvert.formats.stacks import MxStack
from kconvert.models.catalogue import load_manifest
from kconvert.models.manifest import Manifest, Names
from kconvert.models.model import natural_key
from kconvert.models.roles import fusion
from kconvert.models.rules import Match
from kconvert.models.sizes import lookup
from kconvert.models.stacks import Stack
from kconvert.planning.containers import Safetensors
from kconvert.planning.plan import Output, Plan
from kconvert.planning.steps import Mate, Slot, Step, Transcode
from kconvert.targets.base import DEFAULT_SHARD_SIZE
from kconvert.targets.cuts.directory import cut_directory
from kconvert.targets.cuts.gguf import cut_gguf
from kconvert.targets.synthetic import Dealt, Integers, Invented, Picks, Synthetic, Unquantised, can_be_dealt
from kconvert.targets.tokens import tokenizer_files, with_ids

LAYER_TYPES = "layer_types"  # the key of config.json with the kind of attention of each layer


@dataclass(frozen=True)
class SampleRecipe:
    """`sizes` maps a manifest's dimensions (`layers`, `experts`, …) to smaller ones; those not named stay true, but for those
    that the manifest has for any `small` sample.

    `scatter` puts the tensors of one weight into different shards.
    """

    like: str = "kimi-k2-thinking"
    sizes: Mapping[str, int] = field(default_factory=dict)
    shard_size: int = DEFAULT_SHARD_SIZE
    scatter: bool = False
    seed: int = 0


def plan_synthetic(recipe: SampleRecipe) -> Plan:
    """Plan a checkpoint with the manifest's names, dtypes, shapes, config.json and side files, and made-up weights."""
    manifest = load_manifest(recipe.like)
    if not manifest.config:
        raise KconvertError(f"the manifest {manifest.name} describes no checkpoint of its own; choose another --like")
    sizes = {**manifest.small, **recipe.sizes} if recipe.sizes else {}
    config = manifest.resize(manifest.config, sizes)
    _mix_layers(lookup(manifest.section(config), LAYER_TYPES), lookup(manifest.section(manifest.config), LAYER_TYPES))
    quantization = manifest.quantization(config)
    drafts: list[Transcode] = []
    bound = manifest.bind(config)
    names = sorted(bound.expected(), key=lambda item: natural_key(item[0]))
    for name, match in names:
        if 0 in match.shape:
            raise KconvertError(f"{name!r} would be {list(match.shape)}, without any element; choose larger sizes")
        if match.rule.dtype is None:
            # The patterns of a published config.json are about the language model, wherever it is.
            scheme = quantization.scheme_for(name.removeprefix(manifest.prefix))
            drafts.append(_invent_weight(name, match, _spelling(manifest, config, match, scheme), recipe.seed))
        else:
            drafts.append(_invent_tensor(name, match, match.rule.dtype, bound, recipe.seed))
    drafts = _fuse(drafts, {name: match.rule.role for name, match in names})
    slots = _slots(bound.stacks.values(), {draft.name for draft in drafts if draft.target.quantised})
    drafts = [draft._replace(slot=slots.get(draft.name)) for draft in drafts]
    container = Safetensors(recipe.shard_size, manifest.shard_name, recipe.scatter)
    vocab = bound.size("vocab")
    config, side_files = with_ids(config, vocab), tokenizer_files(vocab, manifest.side_files)
    parameters = sum(math.prod(match.shape) for _, match in names)
    facts = {"like": manifest.name, "parameters": parameters, "seed": recipe.seed, "config": config}
    return Output(repr(recipe), None, drafts, container, config, parameters, lambda _: facts, side_files).plan()


def _mix_layers(kinds: Any, published: Any) -> None:
    """Make the last of few layers another kind where all are of one, and the model's are not: engines keep a cache for each."""
    if isinstance(kinds, list) and len(kinds) > 1 and kinds.count(kinds[0]) == len(kinds):
        kinds[-1] = next((kind for kind in published if kind != kinds[0]), kinds[0])


def _fuse(drafts: Iterable[Transcode], roles: Mapping[str, str]) -> list[Transcode]:
    """What engines fuse shares what is one number of the whole weight, as in published releases."""
    drafts = list(drafts)
    groups: dict[object, list[Mate]] = {}
    for draft in drafts:
        if draft.mates:
            groups.setdefault(fusion(roles[draft.name], draft.name) or draft.name, []).extend(draft.mates)
    together = {mate.name: group for group in map(tuple, groups.values()) for mate in group}
    return [draft._replace(mates=together[draft.name]) if draft.mates else draft for draft in drafts]


def _slots(stacks: Iterable[Stack], quantised: Container[str] = ()) -> dict[str, Slot]:
    """The place of each weight in its stack, but for those quantised ones whose stack is of plain values only."""
    return {
        name: Slot(stack.name, index, len(stack.members), stack.width, stack.bare)
        for stack in stacks
        for index, name in enumerate(stack.members)
        if not (stack.plain and name in quantised)
    }


def _spelling(manifest: Manifest, config: dict[str, Any], match: Match, scheme: Scheme | None) -> Format:
    """The format that this config.json says a weight is in."""
    if match.stack is not None:
        return MxStack(match.stack) if manifest.has_encoded_stacks(config) else Dense("BF16", None, match.shape[1])
    # No engine takes lm_head for a Linear in DeepSeek's dialect, which therefore does not list it.
    if scheme is None or (scheme.format == "fp8" and match.rule.role == "lm_head"):
        return Dense("BF16")
    return manifest.spell(formats.from_scheme(match.rule.applied(scheme)))


def _invent_weight(name: str, match: Match, target: Format, seed: int) -> Transcode:
    rows, cols = match.matrix
    try:
        parts_of(target, rows, cols)
        if can_be_dealt(target):
            return Transcode(name, rows, cols, Picks(name, seed), (), Dealt(target, seed))
        values = Synthetic(name, seed)
        alone = (Mate(name, rows, cols, values, ()),) if target.settles(values) else ()
        return Transcode(name, rows, cols, values, (), target, mates=alone)
    except ValueError as error:
        raise KconvertError(f"weight {name!r} [{rows}, {cols}] cannot be made: {error}") from None


def _invent_tensor(name: str, match: Match, dtype: str, names: Names, seed: int) -> Transcode:
    cols = match.shape[-1]
    rule = match.rule
    source: Invented
    if rule.below is not None:
        source = Integers(name, names.size(rule.below), seed)
    else:
        # Values of F32 tensors must not be exact in bf16: who rounds them is to be found out.
        source = Synthetic(name, seed, float(rule.role == "norm"), 0.7 if dtype == "F32" else 1.0)
    filled = None if rule.filled is None else names.size(rule.filled)
    target = Unquantised(dtype, match.shape, filled)
    return Transcode(name, math.prod(match.shape) // cols, cols, source, (), target)


def _made_up(drafts: Iterable[Step]) -> Iterator[str]:
    tables = [draft.name for draft in drafts if isinstance(draft, Transcode) and isinstance(draft.source, Integers)]
    if tables:
        yield (
            f"made up, as those of the source name experts that are left out: {counted(len(tables), 'table')} of experts by "
            f"token, {tables[0]!r} the first"
        )


def plan_cut(checkpoint: Checkpoint, recipe: SampleRecipe) -> Plan:
    """Plan a copy of the first layers and experts of a real checkpoint, in its own form; only `layers`, `dense_layers` and
    `experts` shrink. See targets.cuts."""
    sizes, shard_size = recipe.sizes, recipe.shard_size
    if isinstance(checkpoint, GgufCheckpoint):
        if recipe.scatter:
            raise KconvertError("a tensor of a GGUF is a whole weight, there is nothing to scatter; leave it out")
        cut = cut_gguf(checkpoint, sizes, shard_size, recipe.seed)
    else:
        cut = cut_directory(checkpoint, sizes, shard_size, recipe.scatter, recipe.seed)
    facts = {"from": checkpoint.name, "sizes": dict(sizes), "notes": list(_made_up(cut.drafts))}
    return Output(repr(recipe), checkpoint, *cut[:4], lambda _: facts, cut.texts).plan()
