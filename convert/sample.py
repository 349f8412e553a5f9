"""Small checkpoints for trials, tests and benchmarks: synthetic in the shape of a manifest, or cut out of a real one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kconvert import formats
from kconvert.checkpoint.config import QuantizationConfig, read_quantization
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import KconvertError
from kconvert.formats.dense import Dense
from kconvert.formats.synthetic import Synthetic, Unquantised
from kconvert.manifest import Manifest, Match, load_manifest, manifest_for
from kconvert.model import natural_key
from kconvert.plan import Copy, Place, Plan, Step, Transcode, final_texts, place
from kconvert.recipe import DEFAULT_SHARD_SIZE


@dataclass(frozen=True)
class SampleRecipe:
    """`sizes` maps a manifest's dimensions (`layers`, `experts`, …) to smaller ones; those not named stay true.

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
    config = manifest.resize(manifest.config, recipe.sizes)
    quantization = read_quantization(config)
    drafts: list[Step] = []
    names = sorted(manifest.bind(config).expected(), key=lambda item: natural_key(item[0]))
    for name, match in names:
        if match.rule.dtype is None:
            drafts.append(_invent_weight(name, match, quantization, recipe.seed))
        else:
            drafts.append(_invent_tensor(name, match, match.rule.dtype, recipe.seed))
    steps, shards = place(drafts, recipe.shard_size, manifest.shard_name, recipe.scatter)
    side_files = {name: text.encode() for name, text in manifest.side_files.items()}
    parameters = sum(math.prod(match.shape) for _, match in names)
    texts = {**side_files, **final_texts(config, shards, parameters)}
    facts = {"like": manifest.name, "parameters": parameters, "seed": recipe.seed, "config": config}
    return Plan(repr(recipe), None, steps, shards, texts, facts)


def _invent_weight(name: str, match: Match, quantization: QuantizationConfig, seed: int) -> Transcode:
    scheme = quantization.scheme_for(name)
    rows, cols = match.shape
    try:
        target = formats.from_scheme(scheme) if scheme else Dense("BF16")
        return Transcode(name, rows, cols, Synthetic(name, seed), (), target)
    except ValueError as error:
        raise KconvertError(f"weight {name!r} [{rows}, {cols}] cannot be made: {error}") from None


def _invent_tensor(name: str, match: Match, dtype: str, seed: int) -> Transcode:
    module, _, suffix = name.rpartition(".")
    cols = match.shape[-1]
    # Values of F32 tensors must not be exact in bf16: who rounds them is to be found out.
    center, gain = float(match.rule.role == "norm"), 0.7 if dtype == "F32" else 1.0
    source = Synthetic(name, seed, center, gain)
    return Transcode(module, math.prod(match.shape) // cols, cols, source, (), Unquantised(suffix, dtype, match.shape))


def plan_cut(checkpoint: Checkpoint, recipe: SampleRecipe) -> Plan:
    """Plan a copy of the first layers and experts of a real checkpoint; only `layers`, `dense_layers`, `experts` shrink."""
    manifest = manifest_for(checkpoint.config)
    config = manifest.resize(checkpoint.config, recipe.sizes)
    _check_cut(manifest, checkpoint, recipe)
    drafts: list[Step] = []
    names = sorted(manifest.bind(config).expected(), key=lambda item: natural_key(item[0]))
    for name, match in names:
        drafts += _cut_tensors(checkpoint, name, match)
    steps, shards = place(drafts, recipe.shard_size, scatter=recipe.scatter)
    parameters = sum(math.prod(match.shape) for _, match in names)
    facts = {"from": checkpoint.name, "sizes": dict(recipe.sizes)}
    return Plan(repr(recipe), checkpoint, steps, shards, final_texts(config, shards, parameters), facts)


def _check_cut(manifest: Manifest, checkpoint: Checkpoint, recipe: SampleRecipe) -> None:
    if manifest.accepts_any:
        raise KconvertError(
            f"{checkpoint.root}: no manifest knows this model, so its layers and experts cannot be told"
        )
    for symbol, size in recipe.sizes.items():
        if symbol not in ("layers", "dense_layers", "experts"):
            raise KconvertError(f"--{symbol.replace('_', '-')} cannot be cut out of real weights; leave it out")
        have = checkpoint.config.get(manifest.dims[symbol])
        if not isinstance(have, int) or size > have:
            raise KconvertError(f"--{symbol.replace('_', '-')} {size} is more than the checkpoint's {have}")


def _cut_tensors(checkpoint: Checkpoint, name: str, match: Match) -> list[Step]:
    """The tensors of one weight, or the first rows of one tensor (of the router: those of the experts that stay)."""
    whole = checkpoint.tensors.get(name)
    if whole is None:
        suffixes = sorted(formats.SUFFIXES)
        found = [checkpoint.tensors[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in checkpoint.tensors]
        if not found:
            raise KconvertError(f"{checkpoint.root} has no tensor of {name!r}; fetch the rest of the checkpoint")
        return [Copy(t.name, t.dtype, t.shape, (Place(t.file, t.start),)) for t in found]
    if whole.shape[1:] != match.shape[1:] or whole.shape[0] < match.shape[0]:
        raise KconvertError(f"{whole} has the shape {list(whole.shape)}, too small for {list(match.shape)}")
    return [Copy(whole.name, whole.dtype, match.shape, (Place(whole.file, whole.start),))]
