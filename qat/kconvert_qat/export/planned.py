"""What an export will write: of the model's matrices and the rest the names, the encodings and the places."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kconvert.address import open_checkpoint
from kconvert.checkpoint.listing import INDEX_NAME
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import with_quantization
from kconvert.errors import KconvertError
from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.stacks import MxStack
from kconvert.models.catalogue import manifest_for
from kconvert.models.model import natural_key
from kconvert.planning.containers import Safetensors
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Copy, Step, Transcode
from kconvert.planning.texts import Text
from kconvert.run.state.patch import signed
from kconvert.targets.base import DEFAULT_SHARD_SIZE, is_linear_role
from kconvert_qat.attach import Coverage, adapters_of, coverage
from kconvert_qat.config import CONFIG_NAME as QAT_CONFIG_NAME
from kconvert_qat.config import QATConfig
from kconvert_qat.experts import ExpertWeight
from kconvert_qat.export.readable import DTYPES, check_readable
from kconvert_qat.grids.native import native_formats
from kconvert_qat.names import Matrix, base_model, check_grid, config_of, plain_tensors, published_spelling

BF16 = Dense("BF16")


@dataclass(frozen=True)
class Stacked:
    """All matrices of a parameter [experts, rows, cols], as gpt-oss has them in one tensor, where gate and up take turns."""

    weight: ExpertWeight

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrices, one above the other."""
        rows, cols = self.weight.shape
        return self.weight.tensor.shape[0] * len(self.weight.pieces) * rows, cols

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[experts, rows, cols] in `tensor`, which is laid out as the weight is; a view."""
        return tensor.mT if self.weight.transposed else tensor


@dataclass(frozen=True)
class Export:
    """What is written, and the tensors in memory that it is made of: the experts' matrices and the rest, by name.

    `id` is that of this export and no other. `fused` are the matrices that share a number of the whole with each of them,
    itself among them.
    """

    id: str
    plan: Plan
    matrices: Mapping[str, Matrix | Stacked]
    rest: Mapping[str, torch.Tensor]
    fused: Mapping[str, Sequence[Matrix]]


def plan_export(
    model: nn.Module,
    *,
    source: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    for_transformers: bool = True,
) -> Export:
    """What `export` would write; KconvertError where it would refuse, which is worth knowing before training."""
    task = plan_of(model, source, tokenizer, shard_size)
    check_readable(model, task.plan, for_transformers)
    return task


def plan_of(
    model: nn.Module, source: str | os.PathLike[str] | None, tokenizer: Any = None, shard_size: int = DEFAULT_SHARD_SIZE
) -> Export:
    """The same without asking whether it could be read."""
    covered = coverage(model)
    if adapters_of(model):
        advice = "merge_and_unload()" if covered.config.lora == "merged" else "unload(), and save the adapter with PEFT"
        raise KconvertError(
            f"the model has adapters that a quantised checkpoint cannot hold; export the result of {advice}"
        )
    return _plan(model, covered, None if source is None else open_checkpoint(source), tokenizer, shard_size)


def _plan(model: nn.Module, covered: Coverage, source: Checkpoint | None, tokenizer: Any, shard_size: int) -> Export:
    config = covered.config
    own = config_of(model) if source is None else source.config
    stacks = has_stacks(own, config)
    spelling = published_spelling(model, source)
    matrices: dict[str, Matrix | Stacked] = {}
    if stacks:
        matrices |= {spelling(weight.key): Stacked(weight) for weight in covered.weights}
    else:
        matrices |= {spelling(f"{matrix.name}.weight").removesuffix(".weight"): matrix for matrix in covered.matrices}
    rest = {spelling(name): tensor for name, tensor in plain_tensors(model, covered.weights, apart=not stacks).items()}
    if source is not None:
        check_grid(source.config, config, _named(matrices))
    native = {} if source is None or stacks else native_formats(source, matrices, config)
    drafts = _drafts(matrices, rest, native, config)
    container = Safetensors(shard_size)
    steps, shards = container.place(drafts)
    parameters = covered.parameters + sum(tensor.numel() for tensor in rest.values())
    if not native:
        own = with_quantization(own, _table(own, config, matrices, rest))
    number = uuid.uuid4().hex
    texts: dict[str, Text] = {
        QAT_CONFIG_NAME: config.to_json().encode(),
        **({} if source else _side_texts(model, tokenizer)),
        **container.texts(own, shards, parameters),
    }
    texts[INDEX_NAME] = signed(bytes(texts[INDEX_NAME]), number)
    if source is not None:
        kept = {name: size for name, size in source.side_files.items() if name not in texts}
        source = replace(source, side_files=kept)
    # No two exports are the same, so that none goes on where another was interrupted.
    plan = Plan(f"{config} {number}", source, steps, shards, texts, {"to": config.grid, "parameters": parameters})
    return Export(number, plan, matrices, rest, _fused(covered.matrices, matrices) if config.spec.fuses else {})


def has_stacks(config_json: dict[str, Any], config: QATConfig) -> bool:
    """Whether the model's releases have this grid in stacks of all experts, and in nothing else."""
    return bool(config_json) and manifest_for(config_json).stacked_method == config.grid


def _named(matrices: Mapping[str, Matrix | Stacked]) -> Iterator[Matrix]:
    """Each under the name that it has in the export; those of stacks have none."""
    for name, matrix in matrices.items():
        if isinstance(matrix, Matrix):
            yield replace(matrix, name=name)


def _drafts(
    matrices: Mapping[str, Matrix | Stacked],
    rest: Mapping[str, torch.Tensor],
    native: Mapping[str, Format],
    config: QATConfig,
) -> list[Step]:
    format = config.spec.format(config.group_size, config.convention)
    drafts: list[Step] = []
    for name, matrix in matrices.items():
        if isinstance(matrix, Stacked):
            stack = MxStack(matrix.weight.tensor.shape[0], exact=True)
            drafts.append(Transcode(name, *matrix.shape, BF16, (), stack))
        else:
            drafts.append(Transcode(name, *matrix.weight.shape, BF16, (), native.get(name, format)))
    drafts += [_draft(name, tensor, native) for name, tensor in rest.items()]
    return sorted(drafts, key=lambda draft: natural_key(draft.name))


def _table(
    own: dict[str, Any],
    config: QATConfig,
    matrices: Mapping[str, Matrix | Stacked],
    rest: Mapping[str, torch.Tensor],
) -> Mapping[str, Any]:
    """The quantization_config of the export."""
    if has_stacks(own, config):
        table: Mapping[str, Any] = manifest_for(own).config["quantization_config"]
        return table
    format = config.spec.format(config.group_size, config.convention)
    return config.spec.table(format, list(matrices), list(_plain_linears(own, rest)))


def _draft(name: str, tensor: torch.Tensor, native: Mapping[str, Format]) -> Step:
    """A tensor as it is, or a matrix that the source has encoded."""
    weight = name.removesuffix(".weight")
    if weight in native and weight != name:
        return Transcode(weight, tensor.shape[0], tensor.shape[1], BF16, (), native[weight])
    return Copy(name, DTYPES[tensor.dtype], tuple(tensor.shape), ())


def _fused(covered: Sequence[Matrix], matrices: Mapping[str, Any]) -> Mapping[str, Sequence[Matrix]]:
    groups: dict[object, list[Matrix]] = {}
    for matrix in covered:
        place = matrix.weight.path if matrix.weight.stacked else matrix.weight.path.rpartition(".")[0]
        groups.setdefault((place, matrix.expert, matrix.piece == "down"), []).append(matrix)
    members = {id(matrix): group for group in groups.values() for matrix in group}
    return {name: members[id(matrix)] for name, matrix in matrices.items()}


def _plain_linears(config: dict[str, Any], rest: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Modules with matrices that stay as they are and that an engine may take for Linears to be quantised."""
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
