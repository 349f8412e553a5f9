"""The tensors of GGUF files by gguf's own numpy code: what spells a weight there, and its values.

Formats for reading only, whose parts are bytes: gguf knows the types, and kconvert's own encoders and decoders have no say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kconvert.formats import Format, Part
from kconvert.formats.engines.ggml import Integers
from kconvert.formats.mx import GROUP, Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.stacks import MxStack
from kconvert.proof.parity.quick import int4
from kconvert.proof.parity.witnesses.base import State, Witness
from kconvert.proof.parity.witnesses.nvfp4 import changed_by_inverse
from kconvert.proof.parity.witnesses.packed import int_codes

if TYPE_CHECKING:
    import torch

PLAIN = frozenset({"F32", "F16", "BF16"})
E2M1 = {
    "MXFP4": (1, 16),
    "NVFP4": (4, 8),
}  # whose codes are such: bytes before them, and bytes whose nibbles belong together
LARGEST = 1 << 24
# Label -> what of some groups is other than in the source, as planned.
CHANGED = {
    "q4_0": "F16 has not the scales of {}, which have the nearest, as planned",
    "nvfp4": "1 / global scale, in F32, changes values of {}, as planned",
}
BY_HEAD = " by head"  # what the label of blocks that lie across their weight ends with


@dataclass(frozen=True, slots=True)
class Blocks(Format):
    """`nbytes` spell `elements` neighbours of a row, in ggml's type `dtype`; with a `factor` an F32 multiplies all values."""

    dtype: str
    elements: int
    nbytes: int
    factor: bool = False

    @property
    def label(self) -> str:
        return self.dtype.lower()

    @property
    def quantised(self) -> bool:
        return self.dtype not in PLAIN

    @property
    def value_dtype(self) -> str:
        return "F32"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        blocks = Part("weight", "U8", (rows, cols // self.elements * self.nbytes))
        return (blocks, Part("scale", "F32", (1,), every=None)) if self.factor else (blocks,)


@dataclass(frozen=True, slots=True)
class KeysAndValues(Format):
    """kv_b as two stacks, a matrix for each head: k_b [heads, rank, nope] is transposed, v_b [heads, value, rank] is not."""

    keys: Blocks
    values: Blocks
    nope: int
    value: int

    @property
    def label(self) -> str:
        labels = dict.fromkeys((self.keys.label, self.values.label))
        return " and ".join(labels) + BY_HEAD * self.quantised

    @property
    def quantised(self) -> bool:
        return self.keys.quantised or self.values.quantised

    @property
    def value_dtype(self) -> str:
        return "F32"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        height = self.nope + self.value
        heads = rows // height
        (k,), (v,) = self.keys.parts(heads * cols, self.nope), self.values.parts(heads * self.value, cols)
        return Part("k_b", "U8", k.shape, every=height), Part("v_b", "U8", v.shape, every=height)


@dataclass(frozen=True, slots=True)
class Turns(Format):
    """Two tensors whose rows take turns: gate and up of gpt-oss's experts."""

    blocks: Blocks

    @property
    def label(self) -> str:
        return self.blocks.label

    @property
    def quantised(self) -> bool:
        return self.blocks.quantised

    @property
    def value_dtype(self) -> str:
        return "F32"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        (part,) = self.blocks.parts(rows // 2, cols)
        return tuple(Part(name, "U8", part.shape, every=2) for name in ("gate", "up"))


class IntegersWitness(Witness[Integers]):
    by_library = False

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """As F32, which has every integer up to LARGEST; what is larger is no number of anything."""
        import torch

        values = state[""].view(shape)
        return torch.where(values.abs() <= LARGEST, values.float(), torch.nan)


class BlocksWitness(Witness[Blocks]):
    by_library = False

    @property
    def keeps_products(self) -> bool:
        return self.format.quantised

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        values = dequantised(self.format, state["weight"], shape)
        return values * state["scale"] if self.format.factor else values

    def claims(self, source: Format) -> bool:
        """Four-bit integers with their scale fit into Q4_0, MXFP4 is MXFP4, and NVFP4 NVFP4."""
        match self.format.dtype, source:
            case "Q4_0", Packed(bits=4, symmetric=True, ordered=False):
                return (source.group_size or GROUP) % GROUP == 0
            case ("MXFP4", Mx(bits=4) | MxStack()) | ("NVFP4", Nvfp4()):
                return True
        return False

    def copies(self, found: State, source: Format, state: State) -> bool:
        """Those of INT4, in another order and with scales of F16."""
        if self.format.dtype != "Q4_0" or self.format.factor or not isinstance(source, Packed):
            return False
        if source.scale_dtype != "BF16" or not self.claims(source):
            return False
        return int4.is_q4_0(state["weight_packed"], state["weight_scale"], found["weight"])

    def nearest(self, source: Format, state: State) -> State | None:
        """With scales of F16, half to even; None also where it cannot hold one."""
        import torch

        if self.format.dtype != "Q4_0" or not isinstance(source, Packed):
            return None
        scale = state["weight_scale"].float()
        half = scale.half().float()
        return None if torch.equal(half, scale) or not half.isfinite().all() else {**state, "weight_scale": half}

    def count_changed(self, source: Format, state: State, shape: tuple[int, int]) -> int:
        if isinstance(source, Packed) and (nearest := self.nearest(source, state)) is not None:
            groups = state["weight_scale"].numel()
            used = (int_codes(source, state["weight_packed"], shape) != 0).view(groups, -1).any(-1)
            return int((used & (nearest["weight_scale"] != state["weight_scale"].float()).view(-1)).sum())
        if self.format.dtype == "NVFP4" and isinstance(source, Nvfp4) and not source.multiplies:
            return changed_by_inverse(state)
        return 0


class KeysAndValuesWitness(Witness[KeysAndValues]):
    by_library = False

    @property
    def keeps_products(self) -> bool:
        return self.format.quantised

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        format, cols = self.format, shape[1]
        heads = shape[0] // (format.nope + format.value)
        k = dequantised(format.keys, state["k_b"], (heads * cols, format.nope))
        v = dequantised(format.values, state["v_b"], (heads * format.value, cols))
        by_head = k.view(heads, cols, format.nope).transpose(1, 2), v.view(heads, format.value, cols)
        return torch.cat(by_head, dim=1).reshape(shape)


class TurnsWitness(Witness[Turns]):
    by_library = False

    @property
    def keeps_products(self) -> bool:
        return self.format.quantised

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        import torch

        half = shape[0] // 2, shape[1]
        both = [dequantised(self.format.blocks, state[name], half) for name in ("gate", "up")]
        return torch.stack(both, dim=1).reshape(shape)

    def claims(self, source: Format) -> bool:
        return BlocksWitness(self.format.blocks).claims(source)


def dequantised(format: Blocks, data: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The values [rows, cols] = `shape` of bytes [rows, …], by gguf: f32, of F16 f16."""
    import torch

    rows = data.view(torch.uint8).reshape(shape[0], -1)
    if format.dtype in ("F32", "F16"):
        return rows.contiguous().view(torch.float32 if format.dtype == "F32" else torch.float16).view(shape)
    import gguf
    import numpy as np

    with np.errstate(all="ignore"):  # whatever a stranger's scales are
        numbers: Any = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[format.dtype])
    values = torch.from_numpy(numbers).view(shape)
    return _signed(values, rows.view(-1, format.nbytes), *E2M1[format.dtype]) if format.dtype in E2M1 else values


def _signed(values: torch.Tensor, blocks: torch.Tensor, head: int, group: int) -> torch.Tensor:
    """Values of e2m1 with the signs of zeros, which gguf's table of codes has not: code 8 is -0 elsewhere.

    Codes begin behind `head` bytes; of each `group` bytes the low nibbles come before the high ones.
    """
    import torch

    codes = blocks[:, head:].reshape(-1, group)
    negative = torch.cat([codes & 8, codes >> 4 & 8], -1).view(values.shape) != 0
    return values.copysign(torch.where(negative, -1.0, 1.0))


def is_known(dtype: str) -> bool:
    """Whether gguf decodes tensors of this type."""
    import gguf

    return dtype in PLAIN or any(kind.name == dtype for kind in gguf.quants._type_traits)
