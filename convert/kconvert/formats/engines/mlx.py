"""MLX's affine integers: codes packed along the rows, a scale and a bias for each group of columns.

| tensor | dtype, shape |
|---|---|
| weight | U32 [out, in * bits / 32]; a stream of codes from 0 to 2^bits - 1 along each row, the lowest bits first |
| scales | BF16, F16 or F32 [out, in / group] |
| biases | as scales |

Codes have 2, 3, 4, 5, 6 or 8 bits, groups 32, 64 or 128 columns. Experts of a layer lie in stacks, which have one dimension
more in front, see models.mlx.
Value of a weight: bf16(code * scale + bias), product and sum in f32. MLX itself computes in the dtype of the scales: with BF16
it rounds the product before it adds, with F32 it gives the sum that is rounded here.
INT4 of compressed-tensors is this with the same words: code + 8 is the code, and the bias -8 * scale, which every dtype of
scales holds. The modes `mxfp4` and `mxfp8` are formats.mx under names of their own.
Source: https://github.com/ml-explore/mlx, `mlx/backend/cpu/quantized.cpp`, `docs/src/python/ops.rst`; https://github.com/ml-explore/mlx-lm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kconvert.errors import Unfit, some_have
from kconvert.formats.base import COUNTED, Fate, Format, Part, refuse_surplus, require
from kconvert.formats.dense import Dense
from kconvert.formats.engines.heads import Heads, Piece
from kconvert.formats.engines.turns import Turns
from kconvert.formats.kernels import Kernels
from kconvert.formats.mx import GROUP, Mx
from kconvert.formats.packed import SCALE_CODES, Packed

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Found, Scheme, Tile

spread, decode_affine = Kernels("gptq").spread, Kernels("mlx").decode_affine
FORMAT = "mlx"
TENSORS = ("weight", "scales", "biases")
# Weights of which the halves lie apart: kv_b by heads, and gpt-oss's experts, whose tensors are stacks.
HALVES = ("embed_q", "unembed_out")
STACKED = ("gate_proj", "up_proj", "down_proj")
SUFFIXES = frozenset(TENSORS) | {f"{name}.{tensor}" for name in (*HALVES, *STACKED) for tensor in (*TENSORS, "bias")}
KINDS = frozenset({(FORMAT, "int"), (FORMAT, "float")})
READS = "integers of 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 and 128, mxfp4 and mxfp8"
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Affine(Format):
    """`bits` is one of BITS, `group_size` one of GROUPS. `strict`: a group of INT4 that loses the sign of a zero, under a scale
    that is negative or zero, is an error, and not only counted."""

    bits: int
    group_size: int
    scale_dtype: str = "BF16"
    strict: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        return f"mlx int{self.bits} group {self.group_size}"

    @property
    def recoverable(self) -> bool:
        return self.bits <= 4

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        if cols % self.group_size:
            raise ValueError(f"its {cols} columns do not divide into groups of {self.group_size}")
        groups = (rows, cols // self.group_size)
        return (
            Part("weight", "U32", (rows, cols * self.bits // 32)),
            Part("scales", self.scale_dtype, groups, values="finite"),
            Part("biases", self.scale_dtype, groups, values="finite"),
        )

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        if not tile.size:
            return
        rows, cols = tile.shape
        words = parts[0].view("u4").reshape(rows, -1)
        codes = words.view("u1") if self.bits == 8 else np.empty((rows, cols), "u1")
        if self.bits != 8:
            spread(words, self.bits, codes)
        scales, biases = (part.view(SCALE_CODES[self.scale_dtype]).reshape(rows, -1) for part in parts[1:])
        decode_affine(codes, scales, biases, tile.reshape(rows, -1, self.group_size))

    def fate(self, source: Format) -> Fate:
        return "recovered" if self.takes_codes(source) else "lossy"

    def takes_codes(self, source: Format) -> bool:
        if not isinstance(source, Packed) or source.ordered or not source.symmetric or source.stack is not None:
            return False
        return (source.bits, source.group_size, source.scale_dtype) == (self.bits, self.group_size, "BF16")

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        parts[0][:] = inputs[0]
        scales, biases = (part.view(SCALE_CODES[self.scale_dtype]) for part in parts[1:])
        lost = _make_biases(inputs[0], inputs[1].view("u2"), self.bits, scales, biases)
        if lost and self.strict:
            raise Unfit(
                f"{some_have(lost, 'groups')} zeros that lose their signs, by scales that are negative or zero",
                COUNTED,
            )
        return lost


def _make_biases(codes: Bytes, steps: Any, bits: int, scales: Any, biases: Any) -> int:
    """steps, bf16 in u16 [groups] -> scales, the same, and biases, -2^(bits - 1) times them, both bf16 in u16 or f32.

    Returns how many groups have codes whose zeros lose their sign. By numpy: where codes stay, nothing else of a model needs a
    kernel.
    """
    import numpy as np

    half = np.float32(1 << (bits - 1))
    if scales.dtype == np.uint16:
        scales[:] = steps
        np.add(steps, np.uint16((bits - 1) << 7), out=biases)
        np.bitwise_xor(biases, np.uint16(0x8000), out=biases)
    else:
        np.left_shift(steps, np.uint32(16), out=scales.view("u4"), dtype=np.uint32)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(scales, -half, out=biases)
    # Those whose bias is not by so much larger an exponent: zero, subnormal, negative, or near what a float can hold.
    smallest, limit = np.uint16(0x80), np.uint16((255 - bits) << 7)
    (rare,) = np.nonzero(steps - smallest >= limit - smallest)
    if not rare.size:
        return 0
    values = (steps[rare].astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(values * half * np.float32(2)).all():
            raise ValueError("it has a scale whose multiple by the largest code is not finite")
    made = values * -half
    biases[rare] = made if biases.dtype == np.float32 else made.view("u4") >> np.uint32(16)
    numbers = _codes(codes.reshape(len(steps), -1)[rare], bits) - np.int16(half)
    lose = (numbers * values[:, None]).view("u4") == np.uint32(1 << 31)
    return int(lose.any(axis=1).sum())


def _codes(stored: Bytes, bits: int) -> Any:
    """Of groups, i16 [groups, n]."""
    import numpy as np

    places = [(stored >> np.uint8(place)) & np.uint8((1 << bits) - 1) for place in range(0, 8, bits)]
    return np.concatenate(places, axis=1).astype(np.int16)


def affine_of(source: Format, cols: int, scale_dtype: str, strict: bool) -> Affine | None:
    """What has the codes of a weight of `cols` columns that is spelt as `source`; None where nothing here has."""
    if not isinstance(source, Packed) or source.group_size not in GROUPS or cols % source.group_size:
        return None
    format = Affine(source.bits, source.group_size, scale_dtype, strict)
    return format if format.takes_codes(source) else None


def spelt(format: Mx) -> Mx:
    """MXFP4 or MXFP8 as MLX calls its tensors."""
    return Mx(format.bits, codes_name="weight", codes_dtype="U32", scale_name="scales")


def from_scheme(scheme: Scheme) -> Affine | Mx | None:
    """See formats.base.Family."""
    if (scheme.format, scheme.type) not in KINDS or scheme.group_size is None:
        return None
    if scheme.type == "float":
        return spelt(Mx(scheme.num_bits)) if scheme.num_bits in (4, 8) and scheme.group_size == GROUP else None
    known = scheme.num_bits in BITS and scheme.group_size in GROUPS
    return Affine(scheme.num_bits, scheme.group_size) if known else None


def recognise(declared: Affine | Mx, found: Found, shape: tuple[int, int] | None) -> tuple[Format, tuple[int, int]]:
    """See formats.base.Family. Where config.json does not name each module, shapes tell, as mlx-lm has it."""
    require(found, "weight", "scales")
    refuse_surplus(found, TENSORS)
    words = found["weight"][1]
    if len(words) != 2:
        raise ValueError(f"its weight {list(words)} is not a matrix")
    cols = shape[1] if shape else words[1] * 32 // declared.bits
    format = _told(found, cols)
    if shape is None and (format.bits, format.group_size) != (declared.bits, declared.group_size):
        raise ValueError(f"its weight {list(words)} and scales {list(found['scales'][1])} are not {declared.label}")
    return format, shape or (words[0], cols)


def _told(found: Found, cols: int, name: str = "") -> Affine | Mx:
    """What spells a weight of `cols` columns by the shapes of its tensors, whose suffixes begin with `name`."""
    (dtype, words), (scale_dtype, scales) = found[f"{name}weight"], found[f"{name}scales"]
    if dtype != "U32" or not cols or not scales or not scales[-1]:
        raise ValueError(f"its {name}weight is {dtype} {list(words)}, with scales {list(scales)} beside it")
    bits, group = words[-1] * 32 // cols, cols // scales[-1]
    if scale_dtype == "U8" and bits in (4, 8) and group == GROUP and f"{name}biases" not in found:
        return spelt(Mx(bits))
    whole = words[-1] * 32 == bits * cols and scales[-1] * group == cols and f"{name}biases" in found
    if bits not in BITS or group not in GROUPS or scale_dtype not in SCALE_CODES or not whole:
        beside = "biases" if f"{name}biases" in found else "no biases"
        raise ValueError(f"its {bits} bits, groups of {group}, {scale_dtype} scales and {beside} are none of {READS}")
    return Affine(bits, group, scale_dtype)


def recognise_halves(found: Found, shape: tuple[int, int] | None) -> tuple[Format, tuple[int, int]]:
    """`recognise` of a weight whose halves lie apart, see formats.engines.heads and turns."""
    if any(suffix.startswith(STACKED) for suffix in found):
        return _stacked(found, shape)
    require(found, *(f"{name}.weight" for name in HALVES))
    keys, values = (found[f"{name}.weight"][1] for name in HALVES)
    if len(keys) != 3 or len(values) != 3:
        raise ValueError(f"its {HALVES[0]} {list(keys)} and {HALVES[1]} {list(values)} are not a matrix for each head")
    heads, rank, v = *keys[:2], values[1]
    nope = shape[0] // max(heads, 1) - v if shape else keys[2]
    halves = [_half(found, name, cols) for name, cols in zip(HALVES, (nope, rank), strict=True)]
    if shape is None and halves[0].quantised:
        raise ValueError("it is quantised, and without a manifest nothing says how many columns it has")
    return by_heads(nope, v, *halves), shape or (heads * (nope + v), rank)


def by_heads(nope: int, v: int, keys: Format, values: Format) -> Heads:
    """kv_b as mlx-lm has it, its keys transposed."""
    return Heads((Piece(HALVES[0], nope, keys, transposed=True), Piece(HALVES[1], v, values)))


def _stacked(found: Found, shape: tuple[int, int] | None) -> tuple[Turns, tuple[int, int]]:
    """gpt-oss's, whose gate and up take turns in the weight; or its biases, as a column."""
    present = [name for name in STACKED if any(suffix.startswith(f"{name}.") for suffix in found)]
    last = "bias" if any(suffix.endswith(".bias") for suffix in found) else "weight"
    require(found, *(f"{name}.{last}" for name in present))
    dtype, own = found[f"{present[0]}.{last}"]
    cols = 1 if last == "bias" else shape[1] if shape else 0
    format = Dense(dtype) if last == "bias" else _half(found, present[0], cols)
    names = tuple(f"{name}.{{}}" if last == "weight" else f"{name}.bias" for name in present)
    if len(own) < 2:
        raise ValueError(f"its {present[0]}.{last} {list(own)} is no stack")
    return Turns(format, own[0], names), shape or (len(present) * own[0] * own[1], cols)


def _half(found: Found, name: str, cols: int) -> Format:
    dtype, _ = found[f"{name}.weight"]
    return Dense(dtype) if f"{name}.scales" not in found else _told(found, cols, f"{name}.")
