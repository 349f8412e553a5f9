"""A GGUF file and the checkpoint that it was made of as two models with the same names, for `verify` to compare.

Whoever made the file, its tensors go by llama.cpp's names; gguf's own table, where it has the model, says which of them a name
of transformers is. The experts of a layer lie in one tensor, kv_b may be split by head, and gpt-oss's gate and up are parted.
Source: https://github.com/ggml-org/llama.cpp, `conversion/`, `gguf-py/gguf/tensor_mapping.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from kconvert.checkpoint.gguf import BLOCKS
from kconvert.checkpoint.gguf_files import GgufCheckpoint, open_gguf
from kconvert.checkpoint.safetensors import Tensor
from kconvert.dialects import QuantizationConfig
from kconvert.errors import CheckFailed, KconvertError, counted
from kconvert.formats import Format
from kconvert.formats.dense import DTYPES, Dense
from kconvert.formats.engines.ggml import Integers
from kconvert.formats.engines.names import names_of
from kconvert.models.experts import experts_in
from kconvert.models.model import Model, Weight
from kconvert.models.sorting import Plain
from kconvert.proof.gguf.kimi_k3 import fused
from kconvert.proof.parity.witnesses.ggml import Blocks, KeysAndValues, Turns, is_known
from kconvert.proof.parity.witnesses.kimi import Exponents

# Whose tensors are the checkpoint's but for what is said above; those of others may be permuted or computed.
ARCHITECTURES = (
    "deepseek2",
    "deepseek32",
    "deepseek4",
    "glm-dsa",
    "qwen3moe",
    "gpt-oss",
    "glm4moe",
    "kimi-k3",
    "minimax-m2",
)
INTEGERS = ("I32", "I64")
# What llama.cpp has in files of its own, or does not run.
ELSEWHERE = ("vision", "projector", "mtp")
# What converters compute from config.json, or keep of the scales of activations.
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", ".input_scale")
# How the tensors of transformers are called where llama.cpp's converter calls them otherwise first.
RESPELT = {
    "e_score_correction_bias": "e_score_correction.bias",
    ".dt_bias": ".dt_proj.bias",
    ".ffn.gate.bias": ".ffn.gate.e_score_correction.bias",
    ".sinks": ".sinks.weight",
    "down_proj_bias": "down_proj.bias",
    "gate_up_proj_bias": "gate_up_proj.bias",
}


def open_related(original: Model, whole: Model, path: Path) -> tuple[Model, Model, tuple[str, ...]]:
    """What of `original`, which was chosen of `whole`, belongs into the GGUF file or files at `path`; these, called as there;
    and notes on what they lack and have besides.

    CheckFailed for whatever is unsound about them; KconvertError for an architecture whose tensors are not known.
    """
    try:
        checkpoint = open_gguf(path)
    except KconvertError as error:
        raise CheckFailed(f"the output is not sound: {error}") from None
    if checkpoint.architecture not in ARCHITECTURES:
        raise KconvertError(
            f"{checkpoint.root / checkpoint.name} is of the architecture {checkpoint.architecture!r}, of which it is not known "
            f"what its tensors are made of; that is known of {', '.join(ARCHITECTURES)}"
        )
    shelf, everything = _Shelf(checkpoint, whole), [*whole.weights, *map(_as_weight, whole.plain)]
    if checkpoint.architecture == "kimi-k3":
        everything = list(fused(everything, whole))
    counterparts = [shelf.counterpart(item) for item in everything]
    chosen = {*(weight.name for weight in original.weights), *(plain.tensor.name for plain in original.plain)}
    pairs = [pair for pair in zip(everything, counterparts, strict=True) if _name(pair[0]) in chosen]
    ours = [item for item, _ in pairs]
    absent = [item for item, other in pairs if other is None and _may_be_absent(item, original)]
    gone = set(map(id, absent))
    expected = replace(
        original,
        checkpoint=replace(original.checkpoint, side_files={}),
        weights=tuple(item for item in ours if isinstance(item, Weight) and id(item) not in gone),
        plain=tuple(item for item in ours if isinstance(item, Plain) and id(item) not in gone),
    )
    besides = [tensor for name, tensor in checkpoint.tensors.items() if name not in shelf.used]
    extra = tuple(Plain(tensor, "rest") for tensor in besides if not tensor.name.endswith(COMPUTED))
    weights = tuple(other for _, other in pairs if other is not None)
    computed = [tensor.name for tensor in besides if tensor.name.endswith(COMPUTED)]
    notes = tuple(_notes(original, absent, computed, weights))
    return expected, Model(checkpoint, original.manifest, QuantizationConfig(), weights, extra, ()), notes


def _as_weight(plain: Plain) -> Weight | Plain:
    """Floats and tables of integers as a weight, whose values are compared and not their bytes; its name is the tensor's."""
    tensor = plain.tensor
    if tensor.dtype in INTEGERS and len(tensor.shape) == 2:
        return Weight(tensor.name, plain.role, *tensor.shape, Integers(tensor.dtype), (tensor,), plain.layer)
    if tensor.dtype not in DTYPES:
        return plain
    cols = tensor.shape[-1] if tensor.shape else 1
    rows = math.prod(tensor.shape[:-1])
    if "gate_up" in tensor.name and tensor.name.endswith("bias"):
        rows, cols = rows * cols, 1  # as their rows take turns
    return Weight(tensor.name, plain.role, rows, cols, Dense(tensor.dtype), (tensor,), plain.layer)


def _name(item: Weight | Plain) -> str:
    return item.name if isinstance(item, Weight) else item.tensor.name


def _may_be_absent(item: Weight | Plain, original: Model) -> bool:
    """Whether models in GGUF run without it."""
    return item.role.partition(".")[0] in ELSEWHERE or (item.layer or 0) >= original.layers or _is_tied(item, original)


def _is_tied(item: Weight | Plain, original: Model) -> bool:
    section = original.manifest.section(original.checkpoint.config)
    return item.role == "lm_head" and section.get("tie_word_embeddings") is True


def _notes(
    original: Model, absent: Iterable[Weight | Plain], computed: list[str], found: Iterable[Weight]
) -> Iterator[str]:
    kinds = (item.role.partition(".")[0] for item in absent)
    counts = Counter(kind if kind in (*ELSEWHERE, "lm_head") else "mtp" for kind in kinds)
    for kind, count in counts.items():
        yield f"{counted(count, 'weight')} of the source's {kind} {'is' if count == 1 else 'are'} not in it"
    if beside := sum(len(weight.companions) for weight in original.weights):
        yield f"{counted(beside, 'scale')} of activations and the cache beside the source's weights are not compared"
    if parted := sum(isinstance(weight.format, KeysAndValues) for weight in found):
        yield f"{parted:,} kv_b put together again from k_b, transposed back, and v_b"
    if computed:
        yield f"{computed[0]!r} is not in the source, converters compute it ({len(computed):,} such in all)"


@dataclass
class _Shelf:
    """The tensors of a GGUF model; `used` are those that have been taken for the source's."""

    checkpoint: GgufCheckpoint
    original: Model
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        items: list[Weight | Plain] = [*self.original.weights, *self.original.plain]
        layers = 1 + max((item.layer or 0 for item in items), default=0)
        self._name_of = cache(names_of(self.checkpoint.architecture, layers))
        self._experts = experts_in(self.original.weights)

    def counterpart(self, item: Weight | Plain) -> Weight | None:
        """The weight that is `item` in the file; None where it is not there."""
        if isinstance(item, Plain):
            return None
        if item.expert is not None:
            return self._expert(item)
        name = item.name.removeprefix(self.original.manifest.prefix)
        name = next((name.replace(old, new) for old, new in RESPELT.items() if name.endswith(old)), name)
        if item.role == "delta.gate":  # called as that of latent attention
            name = name.replace(".g_proj", ".delta_g_proj")
        module, suffix = name, "weight"
        if name.endswith((".weight", ".bias")):
            module, _, suffix = name.rpartition(".")
        if module.endswith("experts.gate_up_proj"):
            return self._turns(item, module, suffix)
        if (stem := self._name_of(module)) is None:
            return None
        if (whole := self._tensor(f"{stem}.{suffix}") or self._tensor(stem)) is None:
            return self._by_head(item, module) if module.endswith("kv_b_proj") else None
        if not _fits(item, whole.shape, shape := _shape(item)):
            raise CheckFailed(
                f"{self.checkpoint.root / whole.file}: tensor {whole.name!r} is {list(whole.shape)}, in the source "
                f"{item.name!r} is {list(shape)}"
            )
        format: Format = Integers(whole.dtype)
        factors: list[Tensor] = []
        if not isinstance(item.format, Integers) or whole.dtype not in INTEGERS:
            format, factors = self._scaled(self._blocks(item, whole), stem, 1)
        return self._taken(item, format, [whole, *factors], item.rows, item.cols)

    def _expert(self, item: Weight) -> Weight | None:
        """One of the matrices of a stack."""
        projection = item.role.partition(".")[2]
        stem = f"blk.{item.layer}.ffn_{projection}_exps"
        stack = self._tensor(f"{stem}.weight")
        count = self._experts[item.layer, item.role]
        if stack is None or len(stack.shape) != 3 or stack.shape[0] != count or (item.expert or 0) >= count:
            return None
        self.used.add(stack.name)
        blocks, factors = self._scaled(self._blocks(item, stack), stem, count)
        tensors = [_slab(tensor, item.expert or 0) for tensor in (stack, *factors)]
        return self._taken(item, blocks, tensors, stack.shape[1], stack.shape[2])

    def _scaled(self, blocks: Blocks, stem: str | None, count: int) -> tuple[Blocks, list[Tensor]]:
        """NVFP4 with the numbers that multiply each of `count` matrices, if there are any."""
        factor = self._tensor(f"{stem}.scale") if blocks.dtype == "NVFP4" else None
        if factor is None or (factor.dtype, factor.shape) != ("F32", (count,)):
            return blocks, []
        self.used.add(factor.name)
        return replace(blocks, factor=True), [factor]

    def _by_head(self, item: Weight, module: str) -> Weight | None:
        """kv_b of k_b [heads, rank, nope] and v_b [heads, value, rank]."""
        both = [self._tensor(f"{self._name_of(module.replace('kv_b', half))}.weight") for half in ("k_b", "v_b")]
        k, v = both
        if k is None or v is None or len(k.shape) != 3 or len(v.shape) != 3:
            return None
        (heads, rank, nope), (_, value, _) = k.shape, v.shape
        if v.shape != (heads, value, rank):
            return None
        format = KeysAndValues(self._blocks(item, k), self._blocks(item, v), nope, value)
        return self._taken(item, format, [k, v], heads * (nope + value), rank)

    def _turns(self, item: Weight, module: str, suffix: str) -> Weight | None:
        """gpt-oss's gate and up, of which its checkpoint has a row each in turn."""
        both = [self._tensor(f"{self._name_of(module.replace('gate_up', half))}.{suffix}") for half in ("gate", "up")]
        gate, up = both
        if gate is None or up is None or (gate.dtype, gate.shape) != (up.dtype, up.shape):
            return None
        cols = 1 if suffix == "bias" else _columns(gate)
        rows = 2 * math.prod(gate.shape) // max(cols, 1)
        return self._taken(item, Turns(self._blocks(item, gate)), [gate, up], rows, cols)

    def _tensor(self, name: str) -> Tensor | None:
        return self.checkpoint.tensors.get(name)

    def _blocks(self, item: Weight, tensor: Tensor) -> Blocks:
        if not is_known(tensor.dtype):
            raise CheckFailed(
                f"{self.checkpoint.root / tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, whose values are not known, "
                f"so it cannot be compared with {item.name!r}"
            )
        _, elements, nbytes = BLOCKS[tensor.dtype]
        return Blocks(tensor.dtype, elements, nbytes)

    def _taken(self, item: Weight, format: Format, tensors: list[Tensor], rows: int, cols: int) -> Weight:
        self.used.update(tensor.name for tensor in tensors)
        return Weight(item.name, item.role, rows, cols, format, tuple(tensors), item.layer, item.expert)


def _shape(item: Weight) -> tuple[int, ...]:
    """What a tensor measures that has all of the weight, and is not transposed."""
    if (height := item.format.height(item.rows)) is not None:
        return item.rows // height, height, item.cols
    if isinstance(item.format, Exponents):
        return (item.cols,)
    return (item.rows, item.cols) if item.format.quantised else item.tensors[0].shape


def _fits(item: Weight, found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether this is its shape; converters put dimensions of one where they like around a convolution's."""
    if item.role != "delta.conv":
        return found == shape
    one, other = (tuple(size for size in sizes if size != 1) for sizes in (found, shape))
    return one == other


def _columns(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.shape else 1


def _slab(stack: Tensor, number: int) -> Tensor:
    nbytes = stack.nbytes // stack.shape[0]
    name = f"{stack.name}[{number}]"
    return Tensor(name, stack.dtype, stack.shape[1:], stack.file, stack.start + number * nbytes, nbytes)
