"""A cut of a GGUF: the blocks of the first layers, of stacks the first experts, and the metadata that counts them.

It goes by llama.cpp's names alone, so whatever architecture it is, and whoever made the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.gguf import ARRAY, Array
from kconvert.checkpoint.gguf_files import GgufCheckpoint
from kconvert.checkpoint.safetensors import Tensor
from kconvert.errors import KconvertError
from kconvert.models.sizes import divisor
from kconvert.planning.gguf import Gguf
from kconvert.planning.steps import Step, copy_of
from kconvert.targets.cuts.base import Cut, check_size, first_of, numbers_below
from kconvert.targets.gguf.architectures import ARCHITECTURES, PART
from kconvert.targets.synthetic import INTEGERS

if TYPE_CHECKING:
    from gguf.gguf_writer import GGUFValue

LAYER = re.compile(r"blk\.([0-9]{1,9})\.(.+)", re.DOTALL)
ALONE = re.compile(r"ffn_(?:gate|up|down)\.([0-9]{1,9})\.")  # an expert's matrix, as files of 2023 have them
ROUTER = ("ffn_gate_inp", "exp_probs_b")
STACKED, NORM = "_exps", "_norm_exps"
APART, FUSED, DOWN = ("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps", "ffn_down_exps"
COUNTS = ("block_count", "leading_dense_block_count", "hash_layer_count")  # of layers, the first ones
MEND = "mend {} in its metadata, or get a sound file"
TABLE = "ffn_gate_tid2eid"  # of experts by token
# What is of the container, which says it anew.
CONTAINER = ("general.alignment", "split.no", "split.count", "split.tensors.count")
GROUPS = ("expert_group_count", "expert_group_used_count")
WHOLE = "rope."  # lists below it are of the parts of a head, all others of layers


def cut_gguf(checkpoint: GgufCheckpoint, sizes: Mapping[str, int], shard_size: int, seed: int) -> Cut:
    """The first layers and experts; those that follow the last layer (MTP) are left out with it.

    KconvertError for sizes that the model has not, and for what gguf has no name for.
    """
    for symbol in sizes.keys() - {"layers", "experts"}:
        raise KconvertError(f"--{symbol.replace('_', '-')} cannot be cut out of a GGUF; leave it out")
    cutting = _Cutting(checkpoint, sizes, seed)
    cutting.check()
    drafts = list(cutting.drafts())
    if not drafts:
        raise KconvertError(f"{checkpoint.title} holds no tensors")
    parameters = sum(math.prod(shape) for draft in drafts for _, _, shape in draft.outputs)
    name = PART.sub("", PurePath(checkpoint.name).stem) or "model"
    return Cut(drafts, Gguf(name, shard_size, dict(cutting.metadata())), {}, parameters)


def _counts_experts(name: str) -> bool:
    """Whether a layer's tensor of this name has a row or a matrix for each expert."""
    stem = name.partition(".")[0]
    return stem in ROUTER or (stem.endswith(STACKED) and not stem.endswith(NORM))


@dataclass(frozen=True)
class _Cutting:
    """What becomes of the tensors and the metadata of a model that is cut to these sizes."""

    checkpoint: GgufCheckpoint
    sizes: Mapping[str, int]
    seed: int

    def check(self) -> None:
        for symbol, have in (("layers", self.layers), ("experts", self.experts)):
            if (size := self.sizes.get(symbol)) is None:
                continue
            if have is None:
                raise KconvertError(
                    f"{self.checkpoint.title} does not say how many {symbol} it has; leave --{symbol} out"
                )
            check_size(symbol, size, have)
        self._check_layers()
        self._check_experts()

    def _check_layers(self) -> None:
        """KconvertError unless the layers are those that the metadata count."""
        found, blocks = {layer for layer, _ in self._names}, self._number("block_count")
        if self.layers is None or blocks is None or not (found or "layers" in self.sizes):
            return
        absent = next((number for number in range(self.layers) if number not in found), None)
        if absent is not None:
            raise KconvertError(
                f"{self.checkpoint.title} says that it has {self.layers} layers, but has no tensor of layer {absent} (from 0); "
                f"{MEND.format('block_count')}"
            )
        if (more := max(found, default=0)) >= max(blocks, 1):
            raise KconvertError(
                f"{self.checkpoint.title} says that it has {blocks} layers, but has tensors of layer {more} (from 0); "
                f"{MEND.format('block_count')}"
            )

    def _check_experts(self) -> None:
        """KconvertError unless stacks have as many experts as the metadata count, and layers with experts have all of them."""
        have = self.experts
        for tensor in self.checkpoint.tensors.values():
            match = LAYER.fullmatch(tensor.name)
            if have is not None and match and _counts_experts(match[2]) and tensor.shape[:1] != (have,):
                raise KconvertError(
                    f"{self.checkpoint.root / tensor.file}: {tensor.title} has the shape {list(tensor.shape)}, of which the "
                    f"first {self._kept} of {have} experts cannot be cut out; {MEND.format('expert_count')}"
                )
        stacks: dict[int, set[str]] = {}
        for layer, name in self._names:
            if (stem := name.removesuffix(".weight")) in (*APART, FUSED, DOWN):
                stacks.setdefault(layer, set()).add(stem)
        own = (*APART, DOWN) if self.checkpoint.architecture in ARCHITECTURES.values() else ()
        usual = {stem for stem in set(own).union(*stacks.values()) if stem != FUSED}
        for layer, stems in stacks.items():
            if lacks := sorted(usual - stems - (set(APART) if FUSED in stems else set())):
                raise KconvertError(
                    f"{self.checkpoint.title} has no tensor 'blk.{layer}.{lacks[0]}.weight', but others of that layer's "
                    "experts; get the whole of it"
                )

    @cached_property
    def _names(self) -> list[tuple[int, str]]:
        """The tensors of layers by number and name."""
        matches = map(LAYER.fullmatch, self.checkpoint.tensors)
        return [(int(match[1]), match[2]) for match in matches if match]

    @cached_property
    def layers(self) -> int | None:
        """Without those that follow the last one; KconvertError where these are more than all."""
        blocks, further = self._number("block_count"), self._number("nextn_predict_layers") or 0
        if blocks is not None and further > blocks:
            raise KconvertError(
                f"{self.checkpoint.title} says that {further} of its {blocks} layers predict further tokens; "
                f"{MEND.format('nextn_predict_layers')}"
            )
        return None if blocks is None else blocks - further

    @cached_property
    def experts(self) -> int | None:
        return self._number("expert_count")

    @property
    def _most(self) -> int | None:
        """Layers that stay; None: all, with those that follow."""
        wanted = self.sizes.get("layers")
        return None if wanted == self.layers else wanted

    @property
    def _kept(self) -> int:
        """Experts that stay."""
        return self.sizes.get("experts", self.experts or 0)

    def _number(self, key: str) -> int | None:
        value = self.checkpoint.metadata.get(f"{self.checkpoint.architecture}.{key}")
        return value if type(value) is int and value >= 0 else None

    def drafts(self) -> Iterator[Step]:
        for tensor in self.checkpoint.tensors.values():
            self._check_type(tensor)
            match = LAYER.fullmatch(tensor.name)
            if match is None:
                yield copy_of(tensor)
            elif self._most is None or int(match[1]) < self._most:
                yield from self._of_layer(tensor, match[2])

    def _check_type(self, tensor: Tensor) -> None:
        from gguf import GGMLQuantizationType

        if tensor.dtype not in GGMLQuantizationType.__members__:
            raise KconvertError(
                f"{self.checkpoint.root / tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, which the gguf package that "
                "is installed cannot write; a later one may"
            )

    def _of_layer(self, tensor: Tensor, name: str) -> Iterator[Step]:
        have, kept = self.experts or 0, self._kept
        stem = name.partition(".")[0]
        if (match := ALONE.match(name)) is not None:
            if int(match[1]) < kept:
                yield copy_of(tensor)
        elif stem == TABLE and kept < have and tensor.dtype in INTEGERS and len(tensor.shape) == 2:
            used = min(tensor.shape[1], kept)
            yield numbers_below(tensor, (tensor.shape[0], used), kept, self.seed)
        elif _counts_experts(name):
            yield first_of(tensor, have, kept)
        else:
            yield copy_of(tensor)

    def metadata(self) -> Iterator[tuple[str, GGUFValue]]:
        """The keys of the source with the counts of what is left, lists of layers among them; an empty list, which says
        nothing and which gguf does not write, is left out."""
        from gguf import GGUFValueType
        from gguf.gguf_writer import GGUFValue

        for key, value in self.checkpoint.metadata.items():
            kind, of = GGUFValueType(self.checkpoint.kinds[key]), None
            found: Any = value
            if isinstance(value, Array):
                found, of = self._items(key, value), GGUFValueType(value.kind)
            if key not in CONTAINER and found != []:
                before, own, word = key.partition(f"{self.checkpoint.architecture}.")
                found = self._counted(word, found) if own and not before else found
                if found is not None:
                    yield key, GGUFValue(found, kind, of)

    def _items(self, key: str, array: Array) -> list[Any]:
        if array.kind == ARRAY or (items := self.checkpoint.items(key)) is None:
            raise KconvertError(f"{self.checkpoint.title}: the key {key!r} is a list of lists, which gguf cannot write")
        return items

    def _counted(self, key: str, value: Any) -> Any:
        """The value under a key of the architecture for what is left; None: the key goes."""
        layers, lengths = self._most, (self.layers, self._number("block_count"))
        if layers is not None:
            if key in COUNTS:
                return min(value, layers)
            if key == "nextn_predict_layers":
                return 0
            if isinstance(value, list) and len(value) in lengths and not key.startswith(WHOLE):
                return value[:layers]
        if key in ("expert_count", "expert_used_count"):
            return min(value, self._kept)
        return self._groups.get(key) if key in GROUPS else value

    @cached_property
    def _groups(self) -> Mapping[str, int]:
        """Of experts, and how many of them a token looks at: whole groups of what is left, of which the router takes the two
        best experts each; nothing where these are all groups."""
        count, used = (self._number(key) or 1 for key in GROUPS)
        if self._kept != self.experts:
            count = divisor(self._kept, min(count, (self._kept + 1) // 2))
            used = divisor(count, used)
        return dict(zip(GROUPS, (count, used), strict=True)) if used < count else {}
