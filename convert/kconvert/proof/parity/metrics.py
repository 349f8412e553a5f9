"""How far values are from those expected: arithmetic on tensors, and on its results.

With a for the expected value and e for the error, found minus expected, both widened to f64 (exact), and sums in f64:
SQNR = 10 log10(sum a^2 / sum e^2) in dB; relative Frobenius error = sqrt(sum e^2 / sum a^2); cosine = sum a(a + e) /
sqrt(sum a^2 sum (a + e)^2). A relative error is the largest |e| of a row over the largest |a| of that row, or over the
largest |a + e| where the row should be zero; over NEGLIGIBLE where these are less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

# Rows with no more than this are dead: real models have some just above the subnormals, which a scale that they share with
# other rows, FP16 and AMX make zero.
NEGLIGIBLE = 2.0**-100
POINTERS = {"torch.bfloat16": "u2", "torch.float32": "f4", "torch.float64": "f8"}  # what the loop takes as it is
LOWEST_DB, HIGHEST_DB = -20, 120  # of the rows' distribution; what lies outside counts as these


@dataclass(frozen=True, slots=True)
class Position:
    """An element, and what it is."""

    row: int
    col: int
    expected: float
    found: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Of some elements, `different` of which have another value than expected; `+` puts two sets of elements together.

    `signal`, `cross` and `noise` are the sums of a^2, a e and e^2; `worst` is where max_abs is. Elements that are not
    finite on either side are counted in `nonfinite` and nowhere else.
    """

    elements: int = 0
    different: int = 0
    nonfinite: int = 0
    signal: float = 0.0
    cross: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    max_relative: float = 0.0
    worst: Position | None = None

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.elements + other.elements,
            self.different + other.different,
            self.nonfinite + other.nonfinite,
            self.signal + other.signal,
            self.cross + other.cross,
            self.noise + other.noise,
            max(self.max_abs, other.max_abs),
            max(self.max_relative, other.max_relative),
            other.worst if other.max_abs > self.max_abs else self.worst,
        )

    @property
    def sqnr(self) -> float | None:
        return sqnr(self.signal, self.noise)

    @property
    def frobenius(self) -> float:
        return math.sqrt(self.noise / (self.signal or _TINY))

    @property
    def cosine(self) -> float:
        """1 where nothing differs, also of zeros with zeros."""
        if not self.noise:
            return 1.0
        found = max(self.signal + 2 * self.cross + self.noise, 0.0)
        return (self.signal + self.cross) / (math.sqrt(self.signal * found) or 1.0)


_TINY = 1e-300


def sqnr(signal: float, noise: float) -> float | None:
    """In dB; None without noise."""
    return 10 * math.log10((signal or _TINY) / noise) if noise else None


@dataclass(frozen=True)
class Spread:
    """Distributions: `rows` by SQNR in whole dB (only rows that differ), `codes` by the code's value, `scales` by the floor
    of 4 log2, that is in quarters of an octave. `+` puts two together."""

    rows: Counter[int] = field(default_factory=Counter)
    codes: Counter[float] = field(default_factory=Counter)
    scales: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Spread) -> Spread:
        # Not Counter's own sum, which drops the codes that never occur.
        sums = []
        for ours, theirs in ((self.rows, other.rows), (self.codes, other.codes), (self.scales, other.scales)):
            both: Counter[float] = Counter(ours)
            both.update(theirs)
            sums.append(both)
        return Spread(*sums)  # type: ignore[arg-type]


def measure(expected: torch.Tensor, found: torch.Tensor, first_row: int = 0) -> tuple[Errors, Counter[int]]:
    """Floats [rows, cols] of any dtype each -> their errors, and the rows that differ by SQNR in whole dB.

    `first_row` is the number of the first row in `Errors.worst`.
    """
    measured = Measured()
    measured.add(expected, found, first_row)
    return measured.result()


LOT = 1 << 14  # rows


@dataclass
class Measured:
    """The errors of rows that come in pieces. They are those of all at once, to the bit, of up to LOT rows; the sums of more
    are added up in lots of that, as far as pieces end there.

    Figures of rows wait in one place: small pieces of memory that stay, among the large ones of values that go, would have the
    heap grow with every weight.
    """

    errors: Errors = field(default_factory=Errors)
    by_sqnr: Counter[int] = field(default_factory=Counter)
    waiting: torch.Tensor | None = None  # f64 [5, LOT], see _row_figures
    rows: int = 0  # that wait

    def add(self, expected: torch.Tensor, found: torch.Tensor, first_row: int) -> None:
        """Floats [rows, cols] of any dtype each, from `first_row` on."""
        import torch

        figures, different = _row_figures(expected, found)
        nonfinite = 0
        if not bool(figures.isfinite().all()):
            finite = expected.isfinite() & found.isfinite()
            expected, found = expected.where(finite, 0.0), found.where(finite, 0.0)
            figures, different = _row_figures(expected, found)
            nonfinite = int(finite.logical_not().sum())
        elements = expected.numel() - nonfinite
        position = None
        if (worst := float(figures[4].max())) > self.errors.max_abs:
            position = _position(expected, found, int(figures[4].argmax()), first_row)
        self.errors += Errors(elements, different, nonfinite, max_abs=worst, worst=position)
        figures, count = _with_scale(figures, found), len(found)
        if self.rows + count > LOT:
            self._settle()
        if count > LOT:
            self._sum(figures)
            return
        if self.waiting is None:
            self.waiting = torch.empty(5, LOT, dtype=torch.float64)
        self.waiting[:, self.rows : self.rows + count] = figures
        self.rows += count

    def result(self) -> tuple[Errors, Counter[int]]:
        """Of all rows, and those that differ by SQNR in whole dB."""
        self._settle()
        return self.errors, self.by_sqnr

    def _settle(self) -> None:
        if self.waiting is not None and self.rows:
            self._sum(self.waiting[:, : self.rows])
            self.rows = 0

    def _sum(self, figures: torch.Tensor) -> None:
        import torch

        signal, cross, noise, largest, worst = figures
        self.errors += Errors(
            signal=float(signal.sum()),
            cross=float(cross.sum()),
            noise=float(noise.sum()),
            max_relative=float((worst / largest.clamp(min=NEGLIGIBLE)).max()),
        )
        ratios = 10 * torch.log10(signal.clamp(min=_TINY) / noise)[noise > 0]
        self.by_sqnr.update(ratios.floor().clamp(LOWEST_DB, HIGHEST_DB).int().tolist())


def _row_figures(expected: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, int]:
    """f64 [5, rows]: a^2, a e and e^2, the largest |a| and |e| of each row; and how many e are not 0."""
    import torch

    figures = torch.empty(5, len(expected), dtype=torch.float64)
    sides = [side.contiguous() if str(side.dtype) in POINTERS else side.float() for side in (expected, found)]
    loop = _measure(*(POINTERS[str(side.dtype)] for side in sides))
    return figures, loop(*sides, figures, *expected.shape)


@cache
def _measure(expected: str, found: str) -> Loop:
    return Loop("figures", "measure", f"{expected}* {found}* f8* i8 i8")


def _with_scale(figures: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """With the largest |a + e| of rows that should be zero in the place of their largest |a|."""
    import torch

    largest = figures[3]
    if not bool(largest.all()):
        figures[3] = torch.where(largest == 0, found.double().abs().amax(-1), largest)
    return figures


def _position(expected: torch.Tensor, found: torch.Tensor, row: int, first_row: int) -> Position:
    """Where the largest error of this row is."""
    col = int((found[row].double() - expected[row].double()).abs().argmax())
    return Position(first_row + row, col, float(expected[row, col]), float(found[row, col]))


def same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same dtype and the same bytes."""
    if expected.dtype != found.dtype:
        return False
    one, two = expected.contiguous(), found.contiguous()
    return same_bytes(one.data_ptr(), two.data_ptr(), one.nbytes)


def same_bytes(one: int, two: int, nbytes: int) -> bool:
    """Whether the bytes at two addresses are the same. torch and numpy take memory to say where they differ."""
    return not _memcmp()(one, two, nbytes)


@cache
def _memcmp() -> Callable[[int, int, int], int]:
    import ctypes

    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    return memcmp


def below(values: torch.Tensor, share: float) -> bool:
    """Whether all of bf16, f16 or f32 `values` are finite and their magnitudes below this share of the dtype's largest."""
    import numpy as np
    import torch

    if not values.numel():
        return True
    kind, unsigned = (torch.int16, np.uint16) if values.element_size() == 2 else (torch.int32, np.uint32)
    bits = values.view(kind).numpy()
    # As integers floats have the order of their magnitudes; with the sign bit they are the largest unsigned ones.
    limit = int(torch.tensor(torch.finfo(values.dtype).max * share, dtype=values.dtype).view(kind))
    sign = 1 << (8 * values.element_size() - 1)
    return int(bits.max()) < limit and int(bits.view(unsigned).max()) % sign < limit


# What a limit may be put on: a floor, or a ceiling.
FLOORS = ("sqnr", "cosine")
CEILINGS = ("max_abs", "max_relative", "frobenius")


@dataclass(frozen=True)
class Limits:
    """How far a weight may be from what is expected: metrics of FLOORS are not to fall under, of CEILINGS not to pass."""

    floors: Mapping[str, float] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def __or__(self, other: Limits) -> Limits:
        """Both, the other's where it has any for the same metric."""
        return Limits({**self.floors, **other.floors}, {**self.ceilings, **other.ceilings})

    def missed(self, errors: Errors) -> str | None:
        """The first limit that is missed, in words; None when all are kept."""
        for metric, floor in self.floors.items():
            value = getattr(errors, metric)
            if value is not None and value < floor:
                return f"{spelled(metric, value)} is under the limit of {floor:g}"
        for metric, ceiling in self.ceilings.items():
            value = getattr(errors, metric)
            if value > ceiling:
                return f"{spelled(metric, value)} is over the limit of {ceiling:g}"
        return None


NAMES = {
    "sqnr": "SQNR",
    "cosine": "cosine",
    "max_abs": "largest error",
    "max_relative": "largest relative error",
    "frobenius": "relative Frobenius error",
}


def spelled(metric: str, value: float) -> str:
    """A metric's value as people read it; cosines need their places."""
    number = f"{value:.2f} dB" if metric == "sqnr" else f"{value:.6f}" if metric == "cosine" else f"{value:.3g}"
    return f"{NAMES[metric]} {number}"
