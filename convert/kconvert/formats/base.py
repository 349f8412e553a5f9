"""What an encoding is: the tensors that spell a weight, and the way from them to an f32 tile and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from kconvert.checkpoint.header import tensor_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kconvert.dialects.base import Scheme

    Bytes = NDArray[np.uint8]
    Tile = NDArray[np.float32]


def tensor_name(weight: str, suffix: str) -> str:
    """What the tensor is called that spells `weight` together with others; see Part."""
    return f"{weight}{suffix}" if suffix[:1] in ("", "_") else f"{weight}.{suffix}"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an encoded weight, called `{weight}.{suffix}`, or `{weight}{suffix}` with a suffix "" or "_…".

    `every` rows of the weight share one slice of the part (1 for codes, 128 for the scales of a block format); None means
    that every tile needs the whole part. A part with a `constant` has these bytes in every sound checkpoint.
    `values` says what is demanded of a part's values: scales are finite and nonnegative or positive, codes are any bits.
    The integers of a part with `below` lie in [0, below).
    A part with `rows` (first, last) belongs to these rows of the weight alone; they begin at a multiple of `every`.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    every: int | None = 1
    constant: bytes | None = None
    values: Literal["any", "nonnegative", "positive"] = "any"
    below: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    def tensor_of(self, weight: str) -> str:
        """The tensor's name."""
        return tensor_name(weight, self.suffix)

    def span(self, rows: int, first: int, last: int) -> tuple[int, int]:
        """Byte range, within the part of a weight of `rows` rows, that rows `first` to `last` (exclusive) need."""
        if self.every is None:
            return 0, self.nbytes
        if self.rows is not None:
            begin, end = self.rows
            rows, first, last = end - begin, min(max(first, begin), end) - begin, min(max(last, begin), end) - begin
        stride = self.nbytes // math.ceil(rows / self.every)
        return first // self.every * stride, math.ceil(last / self.every) * stride


class Format(Protocol):
    """An encoding with all its parameters. Instances are frozen dataclasses; they know no files.

    A tile is a C-contiguous f32 array [rows, cols] whose values are exactly representable in the weight's own dtype.
    The arrays of parts are flat bytes, as cut by `Part.span` for the rows of the tile; `first_row` is a multiple of every
    part's `every`. Both directions work on the caller's buffers and allocate nothing that grows with the tile.
    """

    @property
    def label(self) -> str:
        """What people call it: `bf16`, `int4 group 32`."""
        ...

    def __hash__(self) -> int: ...

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]: ...

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None: ...

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        """Returns how many groups lost something where the format promises to lose nothing; 0 when it promises nothing."""
        ...


class Family(Protocol):
    """What a module of this package offers: the recognition of its encodings among a checkpoint's tensors."""

    SUFFIXES: frozenset[str]

    def from_scheme(self, scheme: Scheme) -> Format | None:
        """The format in which this scheme of config.json spells a weight; None when it is not one of this family's."""
        ...

    def recognise(
        self, scheme: Scheme | None, found: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int] | None
    ) -> tuple[Format, tuple[int, int]]:
        """The format and shape [out, in] of a weight, from its scheme in config.json and its tensors {suffix: (dtype,
        shape)}; `shape` is what the manifest demands. Raises ValueError saying what does not fit."""
        ...
