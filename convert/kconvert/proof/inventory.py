"""A look at the codes of a checkpoint's quantised weights: which grid they lie on, and how they use it.

A few rows of a few weights all over the model; what is asked shows in any of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias

from kconvert.formats.packed import Packed
from kconvert.models.model import Model, Weight
from kconvert.proof.parity.codes import Extremes, convention_of, extremes, grid, spread_of
from kconvert.proof.parity.metrics import Spread
from kconvert.proof.parity.oracle import read_state, row_unit

SAMPLED_WEIGHTS = 64
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class GridSample:
    """`weights` were looked at; `extremes` only of INT4."""

    weights: int
    spread: Spread
    extremes: Extremes

    @property
    def convention(self) -> str | None:
        """See codes.convention_of."""
        return convention_of(self.extremes)


Inventory: TypeAlias = dict[tuple[str, str], GridSample]  # by role and format


def take_inventory(model: Model) -> Inventory:
    """Look into the quantised weights; KconvertError when a file cannot be read."""
    kinds: dict[tuple[str, str], list[Weight]] = defaultdict(list)
    for weight in model.weights:
        if grid(weight.format) is not None and weight.rows and weight.cols:
            kinds[weight.role, weight.format.label].append(weight)
    found: Inventory = {}
    with model.checkpoint.reader() as reader:
        for kind, weights in kinds.items():
            chosen = weights[:: math.ceil(len(weights) / SAMPLED_WEIGHTS)]
            spread, ends = Spread(), Extremes()
            for weight in chosen:
                unit = row_unit(weight)
                rows = min(weight.rows, math.ceil(SAMPLED_ROWS / unit) * unit)
                state = read_state(weight, reader, 0, rows)
                spread += spread_of(weight.format, state, (rows, weight.cols))
                match weight.format:
                    case Packed(bits=4, symmetric=True, ordered=False):
                        ends += extremes(weight.format, state["weight_packed"], (rows, weight.cols))
            found[kind] = GridSample(len(chosen), spread, ends)
    return found
