"""A cut of safetensors files, in whatever form weights lie there: one by one, in stacks, or by heads as MLX has them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import files_beside, without_quantization
from kconvert.dialects.tables import MLX_KEY
from kconvert.errors import KconvertError
from kconvert.models.manifest import Names
from kconvert.models.mlx import is_name
from kconvert.models.model import Model, Weight, natural_key, understand
from kconvert.models.roles import guess
from kconvert.models.rules import Match
from kconvert.models.sorting import Plain
from kconvert.models.stacks import Matrix
from kconvert.planning.containers import METADATA, Safetensors
from kconvert.planning.steps import Step, copy_of
from kconvert.targets.cuts.base import Cut, check_size, first_of, numbers_below
from kconvert.targets.mlx import METADATA as MLX


def cut_directory(checkpoint: Checkpoint, sizes: Mapping[str, int], shard_size: int, scatter: bool, seed: int) -> Cut:
    """The first layers and experts; those that follow the last layer (MTP) are left out with it.

    Where fewer experts stay, tables of them are made up. KconvertError for sizes that the checkpoint has not, and for a model
    whose layers cannot be told.
    """
    model = understand(checkpoint)
    manifest, sizes = model.manifest, dict(sizes)
    whole = manifest.bind(checkpoint.config)
    _check(whole, checkpoint, sizes)
    if "mtp" in manifest.dims and sizes.get("layers") not in (None, _size_of(whole, "layers")):
        sizes["mtp"] = 0
    config = manifest.resize(checkpoint.config, sizes)
    names = manifest.bind(config)
    cutting = _Cutting(model, whole, names, sizes, seed)
    if missing := names.missing(cutting.found):
        raise KconvertError(
            f"{checkpoint.root} has no tensor of {missing[0]!r}, which a {manifest.name} of these sizes has, as its layers are "
            "then of other kinds; choose others"
        )
    drafts = sorted(cutting.drafts(), key=lambda draft: natural_key(draft.name))
    parameters = sum(math.prod(match.shape) for name, match in names.expected() if name in cutting.found)
    is_mlx = MLX_KEY in checkpoint.config or any(map(is_name, checkpoint.tensors))
    container = Safetensors(shard_size, scatter=scatter, metadata=MLX if is_mlx else METADATA)
    beside = filter(checkpoint.has, files_beside(checkpoint.config, model.quantization))
    declared = {name: checkpoint.side_file(name).read_bytes() for name in beside}
    if not cutting.is_quantised:  # what is declared is of weights that are gone
        config, declared = without_quantization(config), {}
    return Cut(drafts, container, config, parameters, declared)


def _check(whole: Names, checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    if whole.manifest.accepts_any:
        raise KconvertError(
            f"{checkpoint.root}: no manifest knows this model, so its layers and experts cannot be told"
        )
    for symbol, size in sizes.items():
        if symbol not in ("layers", "dense_layers", "experts"):
            raise KconvertError(f"--{symbol.replace('_', '-')} cannot be cut out of real weights; leave it out")
        check_size(symbol, size, _size_of(whole, symbol))


def _size_of(whole: Names, symbol: str) -> int | None:
    """None of what such a model has not, or config.json does not say."""
    with suppress(KeyError):
        return whole.size(symbol)
    return None


@dataclass(frozen=True)
class _Cutting:
    """What becomes of the tensors of a model whose names are those of `whole`, in one with these `names` and `sizes`."""

    model: Model
    whole: Names
    names: Names
    sizes: Mapping[str, int]
    seed: int

    @cached_property
    def found(self) -> set[str]:
        """The names of the smaller model that are there."""
        stays = (item for item in self._items if self._match(self.names, item) is not None)
        return {name if self.names.match(name) else f"{name}.weight" for name in map(_name, stays)}

    @property
    def is_quantised(self) -> bool:
        return any(weight.format.quantised and self._stays(weight) for weight in self.model.weights)

    @property
    def _items(self) -> list[Weight | Plain]:
        return [*self.model.weights, *self.model.plain]

    def drafts(self) -> Iterator[Step]:
        """A step for each tensor; a stack keeps the matrices of the experts that stay, which are its first ones."""
        stacked, kept = Counter[str](), Counter[str]()
        for item in self._items:
            stays = self._stays(item)
            for tensor in (*item.tensors, *item.companions) if isinstance(item, Weight) else (item.tensor,):
                if isinstance(tensor, Matrix):
                    stacked[tensor.stack] += 1
                    kept[tensor.stack] += stays
                elif stays:
                    yield self._first(tensor, item)
        for name, count in kept.items():
            if count:
                stack = self.model.checkpoint.tensors[name]
                yield first_of(stack, stack.shape[0], stack.shape[0] * count // stacked[name])
        for tensor in self.model.dropped:
            if self._is_within(tensor.name):
                yield copy_of(tensor)

    def _stays(self, item: Weight | Plain) -> bool:
        """Whether the smaller model has it; by its number of layer and expert, where the manifest does not know it."""
        if self._match(self.whole, item) is None:
            return self._is_within(_name(item))
        return self._match(self.names, item) is not None

    def _match(self, names: Names, item: Weight | Plain) -> Match | None:
        name = _name(item)
        return names.match(name) or (names.tensor(f"{name}.weight") if isinstance(item, Weight) else None)

    def _is_within(self, name: str) -> bool:
        role = guess(name)
        numbers = ((role.layer, self.sizes.get("layers")), (role.expert, self.sizes.get("experts")))
        return all(number is None or most is None or number < most for number, most in numbers)

    def _first(self, tensor: Tensor, item: Weight | Plain) -> Step:
        """A tensor with the rows, or of a stack by itself the matrices, of the experts that stay."""
        match, before = self._match(self.names, item), self._match(self.whole, item)
        if match is None or before is None:
            return copy_of(tensor)
        below = match.rule.below
        if below is not None and self.names.size(below) < self.whole.size(below):
            return numbers_below(tensor, match.shape, self.names.size(below), self.seed)
        return first_of(tensor, before.shape[0], match.shape[0])


def _name(item: Weight | Plain) -> str:
    return item.name if isinstance(item, Weight) else item.tensor.name
