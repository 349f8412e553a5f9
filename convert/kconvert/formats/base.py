"""What an encoding is: the tensors that spell a weight, and the way from them to an f32 tile and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from kconvert.formats.dtypes import ZERO_DTYPES, tensor_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kconvert.formats.conventions import Convention

    Bytes = NDArray[np.uint8]
    Tile = NDArray[np.float32]


# Values are kept; kept where codes and a scale reproduce a group of them, and the run counts the others; rounded.
Fate: TypeAlias = Literal["lossless", "recovered", "lossy"]
FATES: tuple[Fate, ...] = ("lossless", "recovered", "lossy")
ZERO_POINT = "weight_zero_point"
COUNTED = "leave out --require-exact, and such groups are counted"
ROUNDED = "leave out --require-exact, and such groups are rounded"  # and counted, where some may come back
# A weight's tensors: dtype and shape by suffix.
Found: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]

# What lies beside a weight and does not enter its values: how activations, outputs and the cache are scaled. Nobody looks into
# such tensors, whatever they hold: an expert that no token reached has Inf there. They stay with a weight that is copied as it
# is, for the engine that serves its codes, and are left behind where it is decoded.
FACTS = ("scale", "scales", "scale_inv", "scale_ub", "global_scale", "zero_point", "amax")
# Of what goes into a Linear and comes out of it.
ACTIVATIONS = frozenset(
    f"{side}_{fact}" for side in ("input", "output", "activation", "input_activation", "act") for fact in FACTS
)
# Of keys, values and queries, and of what attention makes of them.
CACHE = frozenset(f"{side}_{fact}" for side in ("q", "k", "v", "kv", "prob") for fact in FACTS)
COMPANIONS = ACTIVATIONS | CACHE


def tensor_name(weight: str, suffix: str) -> str:
    """What the tensor is called that spells `weight` together with others; see Part."""
    return f"{weight}{suffix}" if suffix[:1] in ("", "_") else f"{weight}.{suffix}"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an encoded weight, called `{weight}.{suffix}`, or `{weight}{suffix}` with a suffix "" or "_…".

    `every` rows of the weight share one slice of the part (1 for codes, 128 for the scales of a block format); None means
    that every tile needs the whole part. A part with a `constant` has these bytes in every sound checkpoint.
    `values` says what is demanded of a part's values: scales are finite, and nonnegative or positive where no tool makes
    others; codes are any bits. The integers of a part with `below` lie in [0, below).
    `unused`: zero points beside symmetric codes, which must all be zero to mean nothing. It is the bits of each where they are
    packed down the rows (half of the range is added to them), 0 where they are numbers by themselves.
    A part with `rows` (first, last) belongs to these rows of the weight alone; they begin at a multiple of `every`.
    Of a part that lies `across`, a matrix, the slices are columns: every tile gets the whole of it, see `columns`.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    every: int | None = 1
    constant: bytes | None = None
    values: Literal["any", "finite", "nonnegative", "positive"] = "any"
    below: int | None = None
    unused: int | None = None
    rows: tuple[int, int] | None = None
    across: bool = False

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    def fits(self, dtype: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is this part; [], [1] and [1, 1] are the same thing, so are [n] and [n, 1], and for a grid of blocks
        [n, m] and ModelOpt's [n, 1, m, 1]."""
        shape = shape[::2] if len(shape) == 4 and shape[1::2] == (1, 1) else shape
        return dtype == self.dtype and (shape == self.shape or _without_ones(shape) == _without_ones(self.shape))

    def tensor_of(self, weight: str) -> str:
        """The tensor's name."""
        return tensor_name(weight, self.suffix)

    def span(self, rows: int, first: int, last: int) -> tuple[int, int]:
        """Byte range, within the part of a weight of `rows` rows, that rows `first` to `last` (exclusive) need."""
        if self.every is None or self.across:
            return 0, self.nbytes
        if self.rows is not None:
            begin, end = self.rows
            rows, first, last = end - begin, min(max(first, begin), end) - begin, min(max(last, begin), end) - begin
        stride = self.nbytes // max(math.ceil(rows / self.every), 1)
        return first // self.every * stride, math.ceil(last / self.every) * stride

    def columns(self, rows: int, first: int, last: int) -> tuple[int, int]:
        """Which columns of a part that lies across rows `first` to `last` (exclusive) of a weight of `rows` rows need."""
        every = self.every or rows
        width = self.shape[-1] // max(math.ceil(rows / every), 1)
        return first // every * width, math.ceil(last / every) * width


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without dimensions of one at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class Format:
    """An encoding with all its parameters. Instances are frozen dataclasses; they know no files.

    A tile is a C-contiguous f32 array [rows, cols] whose values are exactly representable in the weight's own dtype.
    The arrays of parts are flat bytes, as cut by `Part.span` for the rows of the tile; `first_row` is a multiple of every
    part's `every`. Both directions work on the caller's buffers and allocate less than half as much as the tile has.
    """

    __slots__ = ()
    decodes_bf16 = False  # whether `decode` takes a tile of bf16 bits, u16, as well, to which it rounds

    @property
    def label(self) -> str:
        """What people call it: `bf16`, `int4 group 32`."""
        raise NotImplementedError

    @property
    def quantised(self) -> bool:
        """Whether it has codes and scales, or is one plain tensor."""
        return True

    @property
    def value_dtype(self) -> str:
        """The dtype that holds every value exactly; those of most encodings are bf16."""
        return "BF16"

    @property
    def recoverable(self) -> bool:
        """Whether there may be INT4 codes and scales to be found again in its values: not in those that were FP8."""
        return False

    @property
    def may_have_powers(self) -> bool:
        """Whether its values may be codes times powers of two: those of an encoding with such scales are, plain ones may be."""
        return False

    @property
    def usual(self) -> Format:
        """This encoding by its usual names: two that are the same by these have the same bytes, however they are called."""
        return self

    @property
    def unit(self) -> str:
        """What people call the values that share a scale."""
        return "group"

    @property
    def shortfall(self) -> str:
        """What a run says of the groups that it counts, `{}` of so many weights; see `encode`."""
        return "no codes and scale reproduce the values of {}, which the rule quantised"

    @property
    def matrices(self) -> int | None:
        """How many matrices [out, in] it stacks; None: it is one."""
        return None

    def height(self, rows: int) -> int | None:
        """The rows of each matrix of a weight of `rows` rows in gpt-oss's form of a stack; None in any other form."""
        return None

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        raise NotImplementedError

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        raise NotImplementedError

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        """Returns how many groups lost something where the format promises to lose nothing; 0 when it promises nothing."""
        raise NotImplementedError

    def reach(self, read: Callable[..., Iterator[list[Bytes]]]) -> float | None:
        """A magnitude that no value of the weight is above, by its scales; None where only the values tell.

        `read(0, 2)` has the bytes of the first and the third part of some rows, then of the next ones, and so on.
        """
        return None

    def settles(self, source: Format) -> bool:
        """Whether a weight that is spelt as `source` now gets something that depends on all of its values; see `settle`."""
        return False

    def settle(self, reach: float, parts: Sequence[Bytes]) -> None:
        """Write what depends on the largest magnitude of the weight and of those it is fused with, or a bound of it, into its
        parts; `encode` finds it there with every tile."""

    def takes_codes(self, source: Format) -> bool:
        """Whether a weight that is spelt as `source` becomes this by `recode`, and not by way of its values."""
        return False

    def recode(self, source: Format, inputs: Sequence[Bytes], rows: int, cols: int, parts: Sequence[Bytes]) -> int:
        """The codes and scales of `rows` rows of such a weight, in another order: from its parts to these. Returns what
        `encode` does."""
        raise NotImplementedError

    def check_scales(self, part: Part, data: Bytes) -> None:
        """ValueError where a part of a weight whose codes it takes has a scale that it cannot, whatever the codes are."""

    def stand_ins(self, inputs: Sequence[Bytes], parts: Sequence[Bytes]) -> tuple[Part, ...]:
        """Which of the `parts` that `recode` has made of these are 1 as the source's number is none."""
        return ()

    def fit(self, source: Format, rows: int, cols: int, mse: bool) -> Format:
        """This format for a weight [rows, cols] that is spelt as `source` now, with scales by `mse` where there is a choice.

        Raises ValueError, saying what the weight has or is, where it cannot become this.
        """
        check_form(source, rows)
        if source.matrices is not None:
            raise ValueError(f"is a stack of {source.matrices} matrices; stacks go to bf16 or int4 only")
        return self

    def by_rule(self, convention: Convention, group_size: int, strict: bool) -> Format:
        """This format with codes by this convention, for so many columns, and only where they lose nothing if `strict`; itself
        where there is no such choice."""
        return self

    def scaled(self, mse: bool) -> Format | None:
        """This format with scales by least squared error, or by amax; None where there is no choice."""
        return None

    def with_powers(self) -> Format | None:
        """This format with scales that are powers of two; None where there is no choice."""
        return None

    @property
    def compares_scales(self) -> bool:
        """Whether people are to be told what scales by least squared error gain, or would gain, over those by amax."""
        return False

    def of_rows(self) -> Format:
        """What spells some rows of a weight that this spells as if they were all, with the same codes and scales."""
        return self

    def fate(self, source: Format) -> Fate:
        """What becomes of the values of a weight that is spelt as `source` now; see Fate."""
        return "lossy"


def check_form(source: Format, rows: int) -> None:
    """ValueError for gpt-oss's stacks of experts, matrices [in, out], that are no MXFP4, as engines read no others."""
    if source.height(rows) is not None:
        raise ValueError("is a stack of experts in gpt-oss's form, which goes to bf16 only")


def check_groups(cols: int, size: int | None) -> None:
    """ValueError when `size` columns to a scale leave some over; None: all columns of a row share one."""
    if cols % (size or 1):
        raise ValueError(f"has {cols} columns, which do not divide into groups of {size}")


@lru_cache(maxsize=4096)
def parts_of(format: Format, rows: int, cols: int) -> tuple[Part, ...]:
    """`format.parts(rows, cols)`, shared: a model has 70,000 weights in a handful of shapes."""
    return format.parts(rows, cols)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of one config group are quantised; field names and values are compressed-tensors' own.

    `block` is its block_structure. DeepSeek's dialect is the format `fp8`; others of another spelling are in the KINDS of the
    families. `ordered`: a tensor says which group each column is in. `powers`: of two, which its scales are. `targets` may be
    thousands, which a hash of the others spares.
    """

    format: str
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    targets: tuple[str, ...] = field(default=("Linear",), hash=False)
    block: tuple[int, int] | None = None
    ordered: bool = False
    powers: bool = False

    def __str__(self) -> str:
        size = f" {self.group_size}" if self.group_size else " {}x{}".format(*self.block) if self.block else ""
        sign = "" if self.symmetric else " asymmetric"
        return f"{self.format} {self.type}{self.num_bits} {self.strategy}{size}{sign}"


class Family(Protocol):
    """What a module of this package offers: the recognition of its encodings among a checkpoint's tensors.

    `KINDS` are the (format, type) of the schemes that mean this family, `READS` says in words which of them it reads.
    """

    SUFFIXES: frozenset[str]
    KINDS: frozenset[tuple[str, str]]
    READS: str

    def from_scheme(self, scheme: Scheme) -> Format | None:
        """The format in which this scheme of config.json spells a weight; None when it is not one of this family's."""
        ...

    def recognise(self, declared: Any, found: Found, shape: tuple[int, int] | None) -> tuple[Format, tuple[int, int]]:
        """The format and shape [out, in] of a weight, from what from_scheme says of its scheme (None: it has none) and its
        tensors; `shape` is what the manifest demands. Raises ValueError saying what does not fit."""
        ...


def unused_zero_points(found: Found, rows: int, bits: int = 0) -> tuple[Part, ...]:
    """The part of zero points that lie beside symmetric codes of a weight of `rows` rows, () where there are none.

    Old files have them. `bits`: of a code, where codes, and so perhaps zero points, are packed into words.
    """
    if ZERO_POINT not in found:
        return ()
    dtype, shape = found[ZERO_POINT]
    if dtype not in ZERO_DTYPES:
        raise ValueError(f"its {ZERO_POINT} is {dtype}, not one of {', '.join(ZERO_DTYPES)}")
    packed = bits and dtype == "I32" and len(shape) == 2 and shape[0] == math.ceil(rows * bits / 32)
    return (Part(ZERO_POINT, dtype, shape, every=None, unused=bits if packed else 0),)


def require(found: Found, *suffixes: str) -> None:
    """ValueError when one of these tensors is missing."""
    for suffix in suffixes:
        if suffix not in found:
            raise ValueError(f"it has no {suffix}, but {_listed(found)}")


def refuse_surplus(found: Found, wanted: Collection[str]) -> None:
    """ValueError when there are tensors beside those that spell the weight."""
    if surplus := sorted(found.keys() - set(wanted)):
        raise ValueError(f"it has {_listed(found)}, of which {surplus[0]} does not belong to it")


def _listed(found: Found) -> str:
    return ", ".join(sorted(found))


def scaled_by(strategy: str, rows: int, shape: tuple[int, ...]) -> str:
    """What a scale of this shape is of, whatever config.json calls it: `tensor`, `channel` for one a row, else `strategy`."""
    if _without_ones(shape) == _without_ones((rows,)):
        return "tensor" if rows == 1 and strategy != "channel" else "channel"
    return "tensor" if not _without_ones(shape) else strategy
