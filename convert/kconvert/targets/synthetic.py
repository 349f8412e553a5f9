"""Made-up weights for `kconvert sample`: a format that decodes from nothing.

Values are heavy-tailed (Student's t, 4 degrees of freedom, scaled to 0.02) and exact in bf16; one group of 32 in 128 is
all zero. They depend on the seed, the tensor's name and the place in it alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

from kconvert.formats import Format, Part
from kconvert.formats.conventions import Convention
from kconvert.formats.dense import Dense
from kconvert.formats.kernels import Kernels
from kconvert.formats.packed import Packed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kconvert.formats.base import Bytes, Tile

kernels = Kernels("synthetic")
INTEGERS = {"I32": "<i4", "I64": "<i8"}
POOL_GROUPS = 1 << 15  # 4 MB of f32: stays in the cache
ZERO_EVERY = 128


class Invented(Format):
    """Values that lie in no file."""

    __slots__ = ()

    @property
    def label(self) -> str:
        return "synthetic"

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return ()

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        raise NotImplementedError("nothing is written as invented values")


@dataclass(frozen=True, slots=True)
class Synthetic(Invented):
    """The weight called `name`: `center` + `gain` * heavy-tailed values. A gain of 1 keeps them exact in bf16."""

    name: str
    seed: int = 0
    center: float = 0.0
    gain: float = 1.0

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        key = _key(self.seed, self.name)
        kernels.fill_synthetic(_pool(self.seed), key, first_row, np.float32(self.center), np.float32(self.gain), tile)


@dataclass(frozen=True, slots=True)
class Integers(Invented):
    """The tensor of integers called `name`: those of a row are different and lie in [0, below)."""

    name: str
    below: int
    seed: int = 0

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        import numpy as np

        rows = np.arange(first_row, first_row + tile.shape[0], dtype=np.uint64)
        first = (_key(self.seed, self.name) + rows * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        np.add.outer(
            first % np.uint64(self.below), np.arange(tile.shape[1], dtype=np.uint64), out=tile, casting="unsafe"
        )
        np.remainder(tile, np.float32(self.below), out=tile)


@dataclass(frozen=True, slots=True)
class Unquantised(Format):
    """A tensor that is no Linear, of any rank, as the target of synthetic values; of one row only the first `filled` are not
    zero, where that is not None."""

    dtype: str
    shape: tuple[int, ...]
    filled: int | None = None

    @property
    def label(self) -> str:
        return self.dtype.lower()

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return (Part("", self.dtype, self.shape),)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        raise NotImplementedError("nothing is read as an unquantised tensor, they are copied")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        if self.filled is not None:
            tile[:, self.filled :] = 0
        if self.dtype in INTEGERS:
            parts[0].view(INTEGERS[self.dtype])[:] = tile.reshape(-1)
            return 0
        return Dense(self.dtype).encode(tile, parts)


@dataclass(frozen=True, slots=True)
class Picks(Invented):
    """The groups of the Synthetic weight `name` by their numbers in the pool, for Dealt."""

    name: str
    seed: int = 0

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        kernels.fill_picks(POOL_GROUPS, _key(self.seed, self.name), first_row, tile)


@dataclass(frozen=True, slots=True)
class Dealt(Format):
    """Packed INT4 in groups of 32, dealt from a pool that was encoded once.

    Groups are encoded each by itself, so these are the bytes that encoding Synthetic values gives, at memory's speed.
    """

    format: Packed
    seed: int = 0

    @property
    def label(self) -> str:
        return self.format.label

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return self.format.parts(rows, cols)

    def decode(self, parts: Sequence[Bytes], first_row: int, tile: Tile) -> None:
        raise NotImplementedError("what was dealt is read in its own format")

    def encode(self, tile: Tile, parts: Sequence[Bytes]) -> int:
        codes, scale = _encoded_pool(self.format.convention, self.seed)
        rows, groups = tile.shape[0], tile.shape[1] // 32
        kernels.deal(codes, tile, parts[0].view(codes.dtype).reshape(rows, groups, -1))
        kernels.deal(scale, tile, parts[1].view(scale.dtype).reshape(rows, groups, -1))
        return 0


def can_be_dealt(format: Format) -> TypeGuard[Packed]:
    """Whether Dealt spells this format's weights."""
    return isinstance(format, Packed) and (format.bits, format.group_size, format.symmetric) == (4, 32, True)


@cache
def _encoded_pool(convention: Convention, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Codes u32 [POOL_GROUPS, 4] and scales u16 [POOL_GROUPS, 1] of the pool."""
    import numpy as np

    codes, scale = np.empty((POOL_GROUPS, 16), np.uint8), np.empty((POOL_GROUPS, 1), np.uint16)
    Packed(32, None, convention).encode(_pool(seed), [codes.reshape(-1), scale.reshape(-1).view(np.uint8)])
    return codes.view(np.uint32), scale


def _key(seed: int, name: str) -> Any:
    import numpy as np

    return np.uint64(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little"))


@cache
def _pool(seed: int) -> Tile:
    import numpy as np

    values = 0.02 * np.random.default_rng(seed).standard_t(4, (POOL_GROUPS, 32))
    values[::ZERO_EVERY] = 0
    pool, bits = values.astype(np.float32), np.empty(2 * values.size, np.uint8)
    Dense("BF16").encode(pool, [bits])
    Dense("BF16").decode([bits], 0, pool)
    return pool
