"""All pairs of two checkpoints compared, by several processes where it is worth them.

A crowd compares the pairs by the quick way. Meanwhile one process has the word of compressed-tensors, which takes a while to
load: what config.json declares, and whether the quick way decodes the first rows of each weight as it does. A weight of which
it does not is compared again, without the quick way.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Reader
from kconvert.models.model import Weight
from kconvert.models.sorting import Plain
from kconvert.proof.digests import Listener
from kconvert.proof.pairs import Pair
from kconvert.proof.parity import library
from kconvert.proof.parity.compare import Comparison, Standard, compare_plain, compare_weights
from kconvert.proof.parity.fused import fused_faults
from kconvert.proof.parity.metrics import Position, Spread
from kconvert.proof.parity.oracle import independent_values
from kconvert.proof.parity.rows import Desk, approved
from kconvert.proof.parity.witnesses.registry import witness_of
from kconvert.proof.processes import Crew, worthwhile

Advance: TypeAlias = Callable[[int], None]
Outcome: TypeAlias = tuple[Comparison, Spread] | str | None  # of a pair of weights; of plain tensors the fault
Digests: TypeAlias = dict[str, str]
EXCERPT = 48  # columns around the worst element


@dataclass(frozen=True)
class Job:
    """What the processes of a comparison are asked for, of pairs by their numbers.

    `declared` finds what is wrong with the output's config.json.
    """

    pairs: list[Pair]
    ours: Reader
    theirs: Reader
    standard: Standard
    thorough: bool
    declared: Callable[[], list[str]]
    desk: Desk = field(default_factory=Desk)

    def compare(self, number: int, quickly: bool = True) -> tuple[Outcome, Digests]:
        """Of weights it takes for granted that they will be approved where it goes `quickly`."""
        return self._compared(number, quickly), self.theirs.heard() if isinstance(self.theirs, Listener) else {}

    def _compared(self, number: int, quickly: bool) -> Outcome:
        match self.pairs[number]:
            case Weight() as a, Weight() as b:
                return compare_weights(a, b, self.ours, self.theirs, self.standard, self.desk, self.thorough, quickly)
            case Plain() as a, Plain() as b:
                return compare_plain(a, b, self.ours, self.theirs, self.desk)
        raise AssertionError(self.pairs[number])

    def approve(self, number: int) -> bool:
        """Whether the quick way decodes the pair as the oracle does, as far as can be told by some rows."""
        match self.pairs[number]:
            case Weight() as a, Weight() as b:
                found = approved(a, b, self.ours, self.theirs, self.desk)
            case _:
                found = True
        if isinstance(self.theirs, Listener):
            self.theirs.heard()  # compare hears all of it
        return found

    def excerpt(self, number: int, at: Position) -> tuple[int, tuple[tuple[float, ...], ...]]:
        """The first of EXCERPT columns around this place, and what these are on both sides."""
        first, sides = max(0, at.col - EXCERPT // 2), []
        for weight, reader in zip(self.pairs[number], (self.ours, self.theirs), strict=True):
            assert isinstance(weight, Weight)
            row = independent_values(weight, reader, at.row, at.row + 1)[0]
            sides.append(tuple(row[first : first + EXCERPT].float().tolist()))
        return first, tuple(sides)

    def undeclared(self) -> list[str]:
        return self.declared()


class Comparing:
    """The processes of a job, while the context is entered."""

    def __init__(self, job: Job, advance: Advance) -> None:
        import torch

        torch.set_num_threads(1)
        self._job, self._advance = job, advance
        self._sizes = [tuple(sum(tensor.nbytes for tensor in _tensors(item)) for item in pair) for pair in job.pairs]
        kinds = {(weight.format, weight.cols) for pair in job.pairs for weight in pair if isinstance(weight, Weight)}
        asks = any(witness_of(format).by_library for format, _ in kinds)
        leans = any(witness_of(format).by_library and not witness_of(format).is_quick(cols) for format, cols in kinds)
        # Where it is loaded already there is nothing to be gained; and a process of multiprocessing's pool has no children.
        here = library.is_loaded() or multiprocessing.current_process().daemon
        many = worthwhile(sum(map(sum, self._sizes)))
        self._crowd = Crew(many or int(leans and not here), job)
        self._library = Crew(int(asks and not (here and not many)), job)
        self._open = ExitStack()

    def __enter__(self) -> Comparing:
        self._open.enter_context(self._library)
        self._open.enter_context(self._crowd)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def outcomes(self) -> Iterator[tuple[Outcome, Digests]]:
        """What is wrong with config.json, the outcome of each pair, in order, and what is wrong with several together; and the
        digests that were heard by then."""
        count = len(self._sizes)
        declared, approvals = self._library.ask("undeclared"), self._library.each("approve", count)
        found = self._crowd.each("compare", count)
        yield from ((fault, {}) for fault in declared.result())
        for number, ((outcome, heard), is_approved) in enumerate(zip(found, approvals, strict=True)):
            by_oracle = None if is_approved else self._library.ask("compare", number, False).result()[0]
            self._advance(self._sizes[number][1])
            yield by_oracle or outcome, heard
        if self._job.standard.exact:
            yield from ((fault, {}) for fault in fused_faults(weights_of(self._job.pairs), self._job.theirs))

    def excerpt(self, number: int, at: Position) -> tuple[int, tuple[tuple[float, ...], ...]]:
        """See Job."""
        found: tuple[int, tuple[tuple[float, ...], ...]] = self._library.ask("excerpt", number, at).result()
        return found


def weights_of(pairs: Iterable[Pair]) -> list[tuple[Weight, Weight]]:
    return [(ours, theirs) for ours, theirs in pairs if isinstance(ours, Weight) and isinstance(theirs, Weight)]


def _tensors(item: Weight | Plain) -> tuple[Tensor, ...]:
    return item.tensors if isinstance(item, Weight) else (item.tensor,)
