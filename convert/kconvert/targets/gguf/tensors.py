"""Which tensor of a GGUF file each weight becomes, under which name, and in which type.

Codes of INT4 in groups of 32 go to Q4_0, of MXFP4 to MXFP4 and of NVFP4, where llama.cpp heeds its factor, to NVFP4; other
matrices are BF16 (F16 and F32 stay), or Q8_0 if wanted;
routers, and what is no matrix, F32; tables of integers I32. The experts of a layer lie in one tensor, kv_b is split by head,
gpt-oss's gate and up are taken apart. Names are in formats.engines.names.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from heapq import merge
from typing import TypeAlias

from kconvert.checkpoint.safetensors import Tensor
from kconvert.errors import KconvertError
from kconvert.formats import Format, parts_of
from kconvert.formats.dense import DTYPES, Dense
from kconvert.formats.dtypes import BLOCKS
from kconvert.formats.engines.ggml import INTEGERS, Q4_0, Q8_0, Integers, Mxfp4, Nvfp4Blocks, Whole
from kconvert.formats.engines.heads import Heads, Piece
from kconvert.formats.engines.kimi import Decay, Product
from kconvert.formats.engines.names import names_of
from kconvert.formats.engines.turns import Turns
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.models.experts import experts_in
from kconvert.models.model import Model, Weight, natural_key
from kconvert.models.sorting import Plain
from kconvert.planning.steps import Slot, Step, Transcode, copy_of
from kconvert.targets.gguf.architectures import HAS_FACTOR, section_of
from kconvert.targets.gguf.fields import Fields

Stack: TypeAlias = "tuple[int, str]"  # a layer, and which matrix of its experts
EXPERTS = ("expert.gate", "expert.up", "expert.down")
FUSED = "residual."  # Kimi-K3's, which go into their norms
STAY = ("hyper.", "compressor.", "indexer.")  # small, and not rounded by llama.cpp's tools either
LEFT_OUT = frozenset({"mtp", "vision", "projector", "buffer"})


@dataclass(frozen=True)
class Tensors:
    """What becomes of the `model`'s tensors, which were chosen of `whole`; `q4_0` and `rest` are the types for codes of INT4,
    and for matrices without codes that llama.cpp has, None: as plain numbers."""

    model: Model
    whole: Model
    architecture: str
    layers: int
    q4_0: Q4_0
    rest: Q8_0 | None
    left_out: list[str] = field(default_factory=list)

    def drafts(self) -> Iterator[Step]:
        """A step without places for each weight and tensor, in natural order of the source's names."""
        weights: Iterable[Weight | Plain] = self.model.weights
        for item in merge(weights, self.model.plain, key=lambda item: natural_key(_name(item))):
            if item.role.startswith(FUSED):
                continue
            if self._stays_out(item):
                self.left_out.append(_name(item))
            elif isinstance(item, Weight):
                yield self._weight(item)
            else:
                yield self._plain(item)

    def experts_type(self) -> str:
        """The GGUF type of most routed experts."""
        counts: dict[str, int] = defaultdict(int)
        for weight in self.model.weights:
            if weight.role.startswith("expert."):
                counts[_type_of(self._target(weight))] += 1
        return max(counts, key=lambda dtype: counts[dtype], default="BF16")

    def _stays_out(self, item: Weight | Plain) -> bool:
        """Whether llama.cpp has no use for it: towers, layers behind the last, a head that is the embedding."""
        if item.role.partition(".")[0] in LEFT_OUT or (item.layer is not None and item.layer >= self.layers):
            return True
        if self.model.manifest.plain_role(_name(item)) is not None:
            return True
        return item.role == "lm_head" and section_of(self.model).get("tie_word_embeddings") is True

    def _weight(self, weight: Weight) -> Step:
        if weight.role in EXPERTS and weight.expert is not None:
            return self._expert(weight)
        if weight.format.height(weight.rows) is not None:
            return self._gpt_oss(weight)
        if weight.format.matrices is not None:
            raise KconvertError(f"weight {weight.name!r} is a stack of matrices, which is not mapped to GGUF yet")
        if weight.role == "attention.kv_b":
            return self._kv_b(weight)
        name = weight.name if weight.role != "delta.gate" else weight.name.replace(".g_proj", ".delta_g_proj")
        name = self.name(f"{name}.weight")
        if weight.role == "router":
            return _whole(weight, name, Dense("F32"), (weight.rows, weight.cols))
        target = self._target(weight)
        if target == weight.format:
            return copy_of(weight.tensors[0]._replace(name=name))
        return _whole(weight, name, target, (weight.rows, weight.cols))

    def _expert(self, weight: Weight) -> Step:
        """A matrix of the stack of its layer, all of which are in one type."""
        projection = weight.role.partition(".")[2]
        stack = f"blk.{weight.layer}.ffn_{projection}_exps"
        members = self._stacks[weight.layer or 0, projection]
        target = self._stack_targets[weight.layer or 0, projection]
        assert weight.expert is not None
        slot = Slot(stack, weight.expert, len(members), 1, bare=False)
        if target == weight.format:
            return copy_of(weight.tensors[0], slot=slot)
        shape = (weight.rows, weight.cols)
        return Transcode(weight.name, *shape, weight.format, weight.tensors, target, (), f"{stack}.weight", slot)

    @cached_property
    def _stacks(self) -> Mapping[Stack, list[Weight]]:
        """The experts' matrices by the stack they belong to; KconvertError where one is missing, or of another shape."""
        stacks: dict[Stack, list[Weight]] = defaultdict(list)
        for weight in self.model.weights:
            if weight.role in EXPERTS and weight.expert is not None and not self._stays_out(weight):
                stacks[weight.layer or 0, weight.role.partition(".")[2]].append(weight)
        counts = experts_in(self.whole.weights)
        for (layer, projection), members in stacks.items():
            first = members[0]
            if sorted(weight.expert or 0 for weight in members) != list(range(counts[first.layer, first.role])):
                raise KconvertError(
                    f"layer {layer} lacks the {projection} of some of its experts, and a GGUF has those of a layer in one "
                    "tensor; choose all of them or none"
                )
            other = next((w for w in members if (w.rows, w.cols) != (first.rows, first.cols)), None)
            if other is not None:
                raise KconvertError(
                    f"weight {other.name!r} is [{other.rows}, {other.cols}], not [{first.rows}, {first.cols}] as {first.name!r}"
                )
        return stacks

    @cached_property
    def _stack_targets(self) -> Mapping[Stack, Format]:
        """The type of each stack: that of its matrices, or plain numbers where they differ."""
        targets = {}
        for stack, members in self._stacks.items():
            kinds = {id(weight.format): weight for weight in members}
            found = {self._target(weight): weight for weight in kinds.values()}
            mixed = self._fit(self.rest or Dense("BF16"), members[0])
            targets[stack] = next(iter(found)) if len(found) == 1 else mixed
        return targets

    def _target(self, weight: Weight) -> Format:
        """The type of a matrix."""
        for blocks in (self.q4_0, Mxfp4()):
            if blocks.takes_codes(weight.format):
                return self._fit(blocks, weight)
        if self._stays_nvfp4(weight):
            return Nvfp4Blocks(self.q4_0.strict)
        if self.rest is not None and not weight.role.startswith(STAY):
            return self._fit(self.rest, weight)
        return self._fit(Dense("BF16"), weight) if weight.format.quantised else weight.format

    def _stays_nvfp4(self, weight: Weight) -> bool:
        has_place = weight.role in HAS_FACTOR.get(self.architecture, ()) and weight.cols % BLOCKS["NVFP4"][0] == 0
        return has_place and isinstance(weight.format, Nvfp4)

    def _fit(self, format: Format, weight: Weight) -> Format:
        try:
            fitted = format.fit(weight.format, weight.rows, weight.cols, mse=False)
            parts_of(fitted, weight.rows, weight.cols)
        except ValueError as error:
            advice = "; leave out --rest q8_0, without which it is BF16" * (self.rest is not None)
            raise KconvertError(f"weight {weight.name!r} {error}{advice}") from None
        return fitted

    def _kv_b(self, weight: Weight) -> Transcode:
        """As two stacks with a matrix for each head."""
        fields = self._fields
        format: Format = self.rest or Dense("BF16" if weight.format.quantised else weight.format.value_dtype)
        keys = Piece("_k_b", fields.integer("qk_nope_head_dim"), format, transposed=True)
        target = self._fit(Heads((keys, Piece("_v_b", fields.integer("v_head_dim"), format))), weight)
        output, shape = f"blk.{weight.layer}.attn", (weight.rows, weight.cols)
        return Transcode(weight.name, *shape, weight.format, weight.tensors, target, (), output)

    def _gpt_oss(self, weight: Weight) -> Transcode:
        """gpt-oss's stacks: gate and up take turns in one."""
        if not Mxfp4().takes_codes(weight.format):
            raise KconvertError(
                f"weight {weight.name!r} is a stack of experts [in, out] in {weight.format.label}, which is not mapped to GGUF "
                "yet; convert the release in MXFP4"
            )
        shape, stack = (weight.rows, weight.cols), weight.format.height(weight.rows)
        experts = weight.rows // (stack or 1)
        if weight.role == "expert.gate_up":
            target = Turns(Mxfp4(), experts, ("_gate_exps.{}", "_up_exps.{}"))
            output = f"blk.{weight.layer}.ffn"
            return Transcode(weight.name, *shape, weight.format, weight.tensors, target, (), output)
        return _whole(weight, f"blk.{weight.layer}.ffn_down_exps.weight", Mxfp4(), (experts, stack or 0, weight.cols))

    def _plain(self, plain: Plain) -> Step:
        """Norms, biases and the router in F32, embeddings as they are."""
        tensor, shape = plain.tensor, plain.tensor.shape
        if plain.below is not None and tensor.dtype in INTEGERS and len(shape) == 2:
            return self._table(plain, plain.below)
        if plain.below is not None or tensor.dtype not in DTYPES or not shape:
            raise KconvertError(f"{tensor} is {tensor.dtype} {list(shape)}, which has no place in a GGUF")
        source = Dense(tensor.dtype)
        if plain.role == "expert.gate_up.bias":
            target: Format = Turns(Dense("F32"), shape[0], ("_gate_exps.bias", "_up_exps.bias"), flat=True)
            return Transcode(tensor.name, math.prod(shape), 1, source, (tensor,), target, (), f"blk.{plain.layer}.ffn")
        if tensor.name.endswith((".A_log", "_res_norm.weight")) and self.architecture == "kimi-k3":
            return self._computed(plain)
        name = self.name(tensor.name)
        is_matrix = len(shape) == 2 and name.endswith(".weight") and plain.role != "router"
        whole = Weight(tensor.name, plain.role, math.prod(shape[:-1]), shape[-1], source, (tensor,), plain.layer)
        target = self._target(whole) if is_matrix else Dense("F32")
        return copy_of(tensor._replace(name=name)) if target == source else _whole(whole, name, target, shape)

    def _computed(self, plain: Plain) -> Transcode:
        """What llama.cpp wants of Kimi-K3 computed: a norm with the projection behind it, and how fast memory decays."""
        tensor, cols = plain.tensor, plain.tensor.shape[-1]
        name = self.name(tensor.name)
        if tensor.name.endswith(".A_log"):
            heads = self._fields.integer("num_attention_heads")
            target, output = Decay(min(heads, cols)), name.removesuffix(".weight")
            return Transcode(tensor.name, 1, cols, Dense(tensor.dtype), (tensor,), target, (), output)
        other = tensor.name.replace("_res_norm.", "_res_proj.")
        projection = self._projections.get(other)
        if projection is None or projection.dtype not in DTYPES:
            raise KconvertError(f"{tensor} has no floats {other!r} beside it, with which llama.cpp wants it multiplied")
        both = Product((tensor.dtype, projection.dtype))
        shape = Whole(Dense("F32"), tensor.shape)
        return Transcode(tensor.name, 1, cols, both, (tensor, projection), shape, (), name)

    @cached_property
    def _projections(self) -> Mapping[str, Tensor]:
        return {plain.tensor.name: plain.tensor for plain in self.whole.plain if plain.role.startswith(FUSED)}

    def _table(self, plain: Plain, below: int) -> Transcode:
        """Integers that are experts' numbers, as I32."""
        tensor, (rows, cols) = plain.tensor, plain.tensor.shape
        source, target = Integers(tensor.dtype, below), Whole(Integers("I32"), tensor.shape)
        return Transcode(tensor.name, rows, cols, source, (tensor,), target, (), self.name(tensor.name))

    @property
    def _fields(self) -> Fields:
        return Fields(section_of(self.model), f"{self.model.checkpoint.root}/config.json")

    def name(self, tensor: str) -> str:
        """What llama.cpp calls the tensor; KconvertError where it knows none of this name."""
        inner = tensor.removeprefix(self.model.manifest.prefix)
        for other, usual in SPELLINGS.items():
            inner = usual + inner.removeprefix(other) if inner.startswith(other) else inner
            inner = inner.removesuffix(other) + usual if inner.endswith(other) else inner
        module, _, suffix = inner.rpartition(".") if inner.endswith((".weight", ".bias")) else (inner, "", "weight")
        found = self._name_of(module)
        if found is None:
            raise KconvertError(
                f"{tensor!r} has no place in llama.cpp's {self.architecture} of {self.layers} layers; give a checkpoint "
                "of that model, with its own config.json"
            )
        return f"{found}.{suffix}"

    @cached_property
    def _name_of(self) -> Callable[[str], str | None]:
        return names_of(self.architecture, self.layers)


# What the tables lack, and their own word for it: at the beginning or the end of a name.
SPELLINGS = {
    "layers.": "model.layers.",
    "embed_tokens.": "model.embed_tokens.",
    "norm.weight.": "model.norm.weight.",
    ".e_score_correction_bias": ".e_score_correction.bias",
    ".dt_bias": ".dt_proj.bias",
    ".ffn.gate.bias": ".ffn.gate.e_score_correction.bias",
    ".experts.down_proj_bias": ".experts.down_proj.bias",
}


def _whole(weight: Weight, name: str, target: Format, shape: tuple[int, ...]) -> Transcode:
    """The weight as the tensor `name` in `shape`, and beside it the factor of NVFP4."""
    if isinstance(target, Nvfp4Blocks):
        name = name.removesuffix(".weight")
    else:
        target = Whole(target, shape)
    return Transcode(weight.name, weight.rows, weight.cols, weight.format, weight.tensors, target, (), name)


def _name(item: Weight | Plain) -> str:
    return item.name if isinstance(item, Weight) else item.tensor.name


def _type_of(format: Format) -> str:
    """The GGUF type of a matrix in this format."""
    return format.parts(64, 64)[0].dtype
