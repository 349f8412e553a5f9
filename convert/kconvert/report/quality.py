"""What quantising loses, measured: the signal and the noise of an encoding on a plan's own weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kconvert.errors import KconvertError
from kconvert.formats import Format, parts_of
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Transcode
from kconvert.proof.parity.metrics import sqnr

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Tile

SAMPLED_WEIGHTS = 16
SAMPLED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Gain:
    """Signal-to-quantisation-noise ratios in dB over the sampled weights; None without noise."""

    amax: float | None
    mse: float | None

    def __str__(self) -> str:
        mse, amax = (
            "without noise" if ratio is None else f"{ratio:.2f} dB (relative error {error:.2g})"
            for ratio, error in zip((self.mse, self.amax), self.relative_frobenius, strict=True)
        )
        return f"SQNR {mse} with scales by mse, {amax} by amax"

    @property
    def relative_frobenius(self) -> tuple[float, float]:
        """Norm of the noise over the norm of the signal, for mse and amax."""
        mse, amax = (0.0 if ratio is None else 10 ** (-ratio / 20) for ratio in (self.mse, self.amax))
        return mse, amax


def squares(format: Format, tile: Tile) -> tuple[float, float]:
    """Sums over f32 [rows, cols] of the squared values, and of the squared errors that `format` makes of them."""
    import numpy as np

    parts: list[Bytes] = [np.zeros(part.nbytes, np.uint8) for part in parts_of(format, *tile.shape)]
    served = np.empty_like(tile)
    format.settle(float(np.abs(tile).max(initial=0)), parts)
    format.encode(tile, parts)
    format.decode(parts, 0, served)
    error = np.subtract(tile, served, dtype=np.float64)
    return float(np.einsum("ij,ij", tile, tile, dtype=np.float64)), float(np.einsum("ij,ij", error, error))


def gains(plan: Plan) -> dict[str, Gain]:
    """For each encoding whose scales are to be compared: what those of least squared error gain over amax, on a sample of the
    plan's weights."""
    sums: dict[str, list[float]] = {}
    for name, target, tile in _sample(plan):
        try:
            (signal, noise), (_, by_amax) = (squares(target.scaled(mse) or target, tile) for mse in (True, False))
        except ValueError as error:
            raise KconvertError(f"weight {name!r} cannot be written as {target.label}: {error}") from None
        total = sums.setdefault(target.label, [0.0, 0.0, 0.0])
        total[:] = [total[0] + signal, total[1] + by_amax, total[2] + noise]
    return {label: Gain(sqnr(signal, amax), sqnr(signal, mse)) for label, (signal, amax, mse) in sums.items()}


def _sample(plan: Plan) -> Iterator[tuple[str, Format, Tile]]:
    """The first rows of some weights all over the model, with their names and targets."""
    import numpy as np

    from kconvert.run.tiles import row_unit

    chosen = [step for step in plan.steps if isinstance(step, Transcode) and step.target.compares_scales]
    if plan.source is None or not chosen:
        return
    with plan.source.reader() as reader:
        for step in chosen[:: math.ceil(len(chosen) / SAMPLED_WEIGHTS)]:
            unit = row_unit(step)
            rows = min(step.rows, math.ceil(SAMPLED_ROWS / unit) * unit)
            data: list[Bytes] = []
            for part, place in zip(step.source_parts, step.reads, strict=True):
                start, stop = part.span(step.rows, 0, rows)
                data.append(np.frombuffer(reader.read(place.file, place.start + start, stop - start), np.uint8))
            tile = np.empty((rows, step.cols), np.float32)
            step.source.decode(data, 0, tile)
            yield step.name, step.target.of_rows(), tile
