"""The quantised checkpoint of a trained model, streamed: its experts are the values that training saw.

They go under their per-expert names through the encoder of the grid, a few at a time; everything else keeps its dtype. Where
training began with a checkpoint on the same grid, other than INT4, everything goes back into the encoding that it has there.
The plan, the journal and the writer of shards are those of a conversion. The engine is not: its source is files, and an
export must never be resumed, because the weights may have changed in between.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import kconvert
from kconvert.address import open_checkpoint
from kconvert.checkpoint.files import PAGE
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import with_quantization
from kconvert.errors import KconvertError
from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.models.catalogue import manifest_for
from kconvert.models.model import natural_key
from kconvert.planning.containers import Safetensors
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Copy, Step, Transcode
from kconvert.planning.texts import Text
from kconvert.run.state.finalize import finalize
from kconvert.run.state.journal import Journal
from kconvert.run.writer import ShardWriter
from kconvert.targets.base import DEFAULT_SHARD_SIZE, is_linear_role
from kconvert_qat.attach import Coverage, adapters_of, coverage
from kconvert_qat.config import CONFIG_NAME as QAT_CONFIG_NAME
from kconvert_qat.grid import reaches
from kconvert_qat.grids.native import native_formats
from kconvert_qat.names import Matrix, base_model, config_of, plain_tensors, published_spelling
from kconvert_qat.readable import DTYPES, check_readable

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes


BF16 = Dense("BF16")


@dataclass(frozen=True)
class Export:
    """What is written, and the tensors in memory that it is made of: the experts' matrices and the rest, by name.

    `fused` are the matrices that share a number of the whole with each of them, itself among them.
    """

    plan: Plan
    matrices: Mapping[str, Matrix]
    rest: Mapping[str, torch.Tensor]
    fused: Mapping[str, Sequence[Matrix]]


def export(
    model: nn.Module,
    destination: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    for_transformers: bool = True,
    advance: Callable[[int], None] | None = None,
) -> Plan:
    """Write the prepared `model` into directory `destination`, its experts on the grid that it was trained on.

    `source`, the checkpoint that training began with, lends its names of weights, its config.json and its side files, and where
    its experts are on the same grid (other than INT4) its encodings of everything; without it they come from the model, and the
    `tokenizer` is saved with them. Nothing is written where transformers could
    not load it, as for models whose experts it keeps fused; `for_transformers=False` is for engines that read experts one
    by one all the same. `advance` is called with the bytes written. Under FSDP2 every rank calls this; weights are gathered
    one by one, and the first rank writes. Returns the plan that was carried out.
    """
    task = plan_export(
        model, source=source, tokenizer=tokenizer, shard_size=shard_size, for_transformers=for_transformers
    )
    target = Path(destination)
    leader = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if leader:
        kconvert.check(task.plan, target, overwrite=overwrite)
    with Journal(target, task.plan, overwrite) if leader else nullcontext() as journal:
        _write(task, journal, advance or (lambda nbytes: None))
        if journal is not None:
            finalize(task.plan, journal)
    return task.plan


def plan_export(
    model: nn.Module,
    *,
    source: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    for_transformers: bool = True,
) -> Export:
    """What `export` would write; KconvertError where it would refuse, which is worth knowing before training."""
    covered = coverage(model)
    if adapters_of(model):
        advice = "merge_and_unload()" if covered.config.lora == "merged" else "unload(), and save the adapter with PEFT"
        raise KconvertError(
            f"the model has adapters that a quantised checkpoint cannot hold; export the result of {advice}"
        )
    task = _plan(model, covered, None if source is None else open_checkpoint(source), tokenizer, shard_size)
    check_readable(model, task.plan, for_transformers)
    return task


def _plan(model: nn.Module, covered: Coverage, source: Checkpoint | None, tokenizer: Any, shard_size: int) -> Export:
    config = covered.config
    spelling = published_spelling(model, source)
    matrices = {spelling(f"{matrix.name}.weight").removesuffix(".weight"): matrix for matrix in covered.matrices}
    rest = {spelling(name): tensor for name, tensor in plain_tensors(model, covered.weights).items()}
    format = config.spec.format(config.group_size, config.convention)
    native = {} if source is None else native_formats(source, matrices, config)
    formats = {name: native.get(name, format) for name in matrices}
    drafts: list[Step] = [
        Transcode(name, *matrix.weight.shape, BF16, (), formats[name]) for name, matrix in matrices.items()
    ]
    drafts += [_draft(name, tensor, native) for name, tensor in rest.items()]
    drafts.sort(key=lambda draft: natural_key(draft.name))
    container = Safetensors(shard_size)
    steps, shards = container.place(drafts)
    parameters = covered.parameters + sum(tensor.numel() for tensor in rest.values())
    own = config_of(model) if source is None else source.config
    if not native:
        own = with_quantization(own, config.spec.table(format, list(matrices), list(_plain_linears(model, rest))))
    texts: dict[str, Text] = {
        QAT_CONFIG_NAME: config.to_json().encode(),
        **({} if source else _side_texts(model, tokenizer)),
        **container.texts(own, shards, parameters),
    }
    if source is not None:
        kept = {name: size for name, size in source.side_files.items() if name not in texts}
        source = replace(source, side_files=kept)
    # No two exports are the same, so that none goes on where another was interrupted.
    plan = Plan(f"{config} {uuid.uuid4()}", source, steps, shards, texts, {"to": config.grid, "parameters": parameters})
    return Export(plan, matrices, rest, _fused(matrices) if config.spec.fuses else {})


def _draft(name: str, tensor: torch.Tensor, native: Mapping[str, Format]) -> Step:
    """A tensor as it is, or a matrix that the source has encoded."""
    weight = name.removesuffix(".weight")
    if weight in native and weight != name:
        return Transcode(weight, tensor.shape[0], tensor.shape[1], BF16, (), native[weight])
    return Copy(name, DTYPES[tensor.dtype], tuple(tensor.shape), ())


def _fused(matrices: Mapping[str, Matrix]) -> Mapping[str, Sequence[Matrix]]:
    groups: dict[object, list[Matrix]] = {}
    for matrix in matrices.values():
        place = matrix.weight.path if matrix.weight.stacked else matrix.weight.path.rpartition(".")[0]
        groups.setdefault((place, matrix.expert, matrix.piece == "down"), []).append(matrix)
    members = {id(matrix): group for group in groups.values() for matrix in group}
    return {name: members[id(matrix)] for name, matrix in matrices.items()}


def _plain_linears(model: nn.Module, rest: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Modules with matrices that stay as they are and that an engine may take for Linears to be quantised."""
    config = config_of(model)
    known = manifest_for(config).bind(config)
    for name, tensor in rest.items():
        module, _, suffix = name.rpartition(".")
        match = known.match(module) or known.match(name)
        role = match.rule.role if match else "embedding" if "embed" in module else "other"
        if suffix == "weight" and tensor.dim() == 2 and is_linear_role(role, config.get("model_type")):
            yield module


def _side_texts(model: nn.Module, tokenizer: Any) -> dict[str, bytes]:
    texts = {}
    generation = getattr(base_model(model), "generation_config", None)
    if generation is not None:
        texts["generation_config.json"] = generation.to_json_string().encode()
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            texts.update((path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir()) if path.is_file())
    return texts


def _write(task: Export, journal: Journal | None, advance: Callable[[int], None]) -> None:
    """Every shard, in order; some matrices at a time are encoded in parallel."""
    shards = {shard.name: shard for shard in task.plan.shards}
    writers: dict[str, ShardWriter] = {}
    steps, threads = iter(task.plan.steps), torch.get_num_threads()
    whole = Whole()
    try:
        with ThreadPoolExecutor(threads) as pool:
            while batch := list(islice(steps, 2 * threads)):
                values = [_value(task, step, whole) for step in batch]
                limits = [_reach(task, step, whole) for step in batch]
                if journal is None:
                    continue
                for step, parts in zip(batch, pool.map(_spell, batch, values, limits), strict=True):
                    for spot, data in zip(step.writes, parts, strict=True):
                        if spot.file not in writers:
                            shard, path = shards[spot.file], journal.destination / spot.file
                            writers[spot.file] = ShardWriter(
                                path, journal.partial(spot.file), shard.header, shard.nbytes
                            )
                        if len(data) and writers[spot.file].write(data.data, spot.start):
                            writers.pop(spot.file).commit()
                            journal.record(spot.file)
                        advance(len(data))
    finally:
        for writer in writers.values():
            writer.abandon()


class Whole:
    """Gathers sharded tensors (FSDP2), and keeps those of one module, whose matrices alternate."""

    def __init__(self) -> None:
        self._module: Any = None
        self._held: dict[str, torch.Tensor] = {}

    def of(self, matrix: Matrix) -> torch.Tensor:
        weight = matrix.weight
        if weight.module is not self._module:
            self._module, self._held = weight.module, {}
        if weight.parameter not in self._held:
            self._held[weight.parameter] = whole(weight.tensor)
        return self._held[weight.parameter]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of it when it is sharded; then every rank must call this."""
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _value(task: Export, step: Step, gathered: Whole) -> torch.Tensor:
    if (matrix := task.matrices.get(step.name)) is not None:
        return matrix.of(gathered.of(matrix))
    return whole(task.rest[step.name if isinstance(step, Copy) else f"{step.name}.weight"])


def _reach(task: Export, step: Step, gathered: Whole) -> float:
    """What the target settles by, see Format.settle; 0 where it settles nothing."""
    if isinstance(step, Copy) or not step.target.settles(BF16):
        return 0.0
    if (fused := task.fused.get(step.name)) is None:
        return max(reaches(_value(task, step, gathered), None, "nvfp4"))
    return max(reach for matrix in fused for reach in reaches(matrix.of(gathered.of(matrix)), None, "nvfp4"))


def _spell(step: Step, value: torch.Tensor, reach: float) -> list[Bytes]:
    """The bytes of each tensor that the step writes, in memory aligned as the file is."""
    if isinstance(step, Copy):
        data = _room(step.nbytes, step.writes[0].start)
        data[:] = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [data]
    parts = step.target_parts
    rooms = [_room(part.nbytes, spot.start) for part, spot in zip(parts, step.writes, strict=True)]
    for part, room in zip(parts, rooms, strict=True):
        if part.constant is not None:
            room[:] = np.frombuffer(part.constant, np.uint8)
    if step.target.settles(BF16):
        step.target.settle(reach, rooms)
    try:
        step.target.encode(value.cpu().bfloat16().float().contiguous().numpy(), rooms)
    except ValueError as error:
        raise KconvertError(f"weight {step.name!r} cannot be written as {step.target.label}: {error}") from None
    return rooms


def _room(nbytes: int, start: int) -> Bytes:
    raw = np.empty(nbytes + PAGE, np.uint8)
    skip = (start - raw.ctypes.data) % PAGE
    return raw[skip : skip + nbytes]
