"""A few weights of each finished shard, compared with what they were made from: the figures that go with a published copy.

Both sides are read by compressed-tensors and torch, never by the kernels that converted; see oracle. It is no `verify`,
but it can be done while source and output are both on the disk, which within a disk budget is the only time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Reader
from kconvert.errors import counted
from kconvert.formats import Format, Part
from kconvert.models.model import Weight
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Origin, Step, Transcode
from kconvert.proof.parity.metrics import measure, sqnr

ROWS = 64
PARITY = "parity"  # what the journal calls it


@dataclass(frozen=True, slots=True)
class Parity:
    """Over the values of some rows of some weights: how many are equal, sums of squares of values and errors, largest error."""

    weights: int = 0
    values: int = 0
    equal: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Parity) -> Parity:
        return Parity(
            self.weights + other.weights,
            self.values + other.values,
            self.equal + other.equal,
            self.signal + other.signal,
            self.noise + other.noise,
            max(self.largest, other.largest),
        )

    def lines(self) -> Iterator[str]:
        if not self.weights:
            return
        yield (
            f"- parity: of {self.values:,} values in {counted(self.weights, 'weight')}, the first rows of one of each kind in "
            f"each shard, {self.equal:,} are exactly those that compressed-tensors and torch read from the source"
        )
        ratio = sqnr(self.signal, self.noise)
        if ratio is not None:
            yield f"- SQNR {ratio:.2f} dB, largest error {self.largest:.3g} (the same values)"


class SpotCheck:
    """Looks at each shard of a plan once it is finished, see run.departures.Card."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, shard: str, source: Reader, output: Reader) -> Mapping[str, Any]:
        return {PARITY: asdict(_shard_parity(self._steps.get(shard, ()), source, output))}

    @cached_property
    def _steps(self) -> Mapping[str, Sequence[Step]]:
        """The steps that write no other shard than this one."""
        steps: dict[str, list[Step]] = defaultdict(list)
        for step in self._plan.steps:
            if len(shards := {place.file for place in step.writes}) == 1:
                steps[shards.pop()].append(step)
        return steps


def parity_of(records: Iterable[Mapping[str, Any]]) -> Parity:
    """What was found of all shards, from what the journal has of each."""
    return sum((Parity(**record.get(PARITY, {})) for record in records), Parity())


def _shard_parity(steps: Iterable[Step], source: Reader, output: Reader) -> Parity:
    """Of the first weight of each pair of formats among `steps`, which are those that wrote one shard."""
    chosen: dict[tuple[str, str], Transcode] = {}
    for step in steps:
        if isinstance(step, Transcode) and step.reads and step.rows and step.cols:
            chosen.setdefault((step.source.label, step.target.label), step)
    return sum((_compare(step, source, output) for step in chosen.values()), Parity())


def _compare(step: Transcode, source: Reader, output: Reader) -> Parity:
    from kconvert.proof.parity.oracle import independent_values

    rows = min(step.rows, ROWS)
    try:
        expected = independent_values(_weight(step, step.source, step.source_parts, step.reads), source, 0, rows)
        found = independent_values(_weight(step, step.target, step.target_parts, step.writes), output, 0, rows)
    except NotImplementedError:  # nobody else reads this format
        return Parity()
    errors, _ = measure(expected, found)
    same = errors.elements - errors.different
    return Parity(1, errors.elements, same, errors.signal, errors.noise, errors.max_abs)


def _weight(step: Transcode, format: Format, parts: tuple[Part, ...], places: tuple[Origin, ...]) -> Weight:
    tensors = tuple(
        Tensor(part.tensor_of(step.name), part.dtype, part.shape, place.file, place.start, part.nbytes)
        for part, place in zip(parts, places, strict=True)
    )
    return Weight(step.name, "", step.rows, step.cols, format, tensors)
