"""All pairs of two checkpoints compared, by several processes where it is worth them.

A crowd compares the pairs by the quick way. Meanwhile one process has the word of compressed-tensors, which takes a while to
load: what config.json declares, and whether the quick way decodes the first rows of each weight as it does. A weight of which
it does not is compared again, without the quick way.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from kconvert.checkpoint.listing import FileStat
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Reader
from kconvert.models.model import Weight
from kconvert.models.sorting import Plain
from kconvert.native import prepare
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
Compared: TypeAlias = Generator[tuple[Outcome, Digests], None, None]
Elsewhere: TypeAlias = Callable[[Advance], Compared]
EXCERPT = 48  # columns around the worst element


@dataclass(frozen=True)
class Job:
    """What the processes of a comparison are asked for, of pairs by their numbers.

    `declared` finds what is wrong with the output's config.json; `files` are those of the source and of the output. `forks` may
    read them, unless they come by connections, which processes cannot share.
    """

    pairs: list[Pair]
    ours: Reader
    theirs: Reader
    standard: Standard
    thorough: bool
    declared: Callable[[], list[str]]
    files: tuple[Mapping[str, FileStat], Mapping[str, FileStat]]
    forks: bool
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

    @cached_property
    def stamp(self) -> str:
        """Changes when a side's files do, or the pairs."""
        files = [(name, stat.stamp) for side in self.files for name, stat in side.items()]
        names = [item.name if isinstance(item, Weight) else item.tensor.name for pair in self.pairs for item in pair]
        formats = {repr(item.format) for pair in self.pairs for item in pair if isinstance(item, Weight)}
        text = repr((files, names, sorted(formats)))
        return hashlib.sha256(text.encode()).hexdigest()

    def undeclared(self) -> list[str]:
        return self.declared()


class Comparing:
    """The processes of a job, while the context is entered; they are to share so many cores, or all.

    With an `elsewhere` the pairs are compared there.
    """

    def __init__(
        self,
        job: Job,
        advance: Advance,
        cores: int | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        import torch

        torch.set_num_threads(1)
        self._job, self._advance = job, advance
        self._elsewhere, self._sizes = elsewhere, sizes_of(job.pairs)
        kinds = {(weight.format, weight.cols) for pair in job.pairs for weight in pair if isinstance(weight, Weight)}
        asks = any(witness_of(format).by_library for format, _ in kinds)
        leans = any(witness_of(format).by_library and not witness_of(format).is_quick(cols) for format, cols in kinds)
        # Where it is loaded already there is nothing to be gained; and a process of multiprocessing's pool has no children.
        here = not job.forks or library.is_loaded() or multiprocessing.current_process().daemon
        many = worthwhile(sum(map(sum, self._sizes)), cores) if job.forks else 0
        if many:
            prepare()
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
        declared = self._library.ask("undeclared")
        compared = self._elsewhere(self._advance) if self._elsewhere else self.compared()
        self._open.enter_context(closing(compared))
        yield from ((fault, {}) for fault in declared.result())
        yield from compared
        if self._job.standard.exact:
            yield from ((fault, {}) for fault in fused_faults(weights_of(self._job.pairs), self._job.theirs))

    def compared(self) -> Compared:
        """The outcome of each pair, in order; begun at once."""
        count = len(self._sizes)
        approvals = self._library.each("approve", count)
        return self._approved(self._crowd.each("compare", count), approvals)

    def _approved(self, found: Iterator[tuple[Outcome, Digests]], approvals: Iterator[bool]) -> Compared:
        for number, ((outcome, heard), is_approved) in enumerate(zip(found, approvals, strict=True)):
            by_oracle = None if is_approved else self._library.ask("compare", number, False).result()[0]
            self._advance(self._sizes[number][1])
            yield by_oracle or outcome, heard

    def excerpt(self, number: int, at: Position) -> tuple[int, tuple[tuple[float, ...], ...]]:
        """See Job."""
        found: tuple[int, tuple[tuple[float, ...], ...]] = self._library.ask("excerpt", number, at).result()
        return found


def fault_of(outcome: Outcome) -> str | None:
    return outcome[0].fault if isinstance(outcome, tuple) else outcome


def sizes_of(pairs: Iterable[Pair]) -> list[tuple[int, ...]]:
    """Of each pair how many bytes either side has."""
    return [tuple(sum(tensor.nbytes for tensor in _tensors(item)) for item in pair) for pair in pairs]


def weights_of(pairs: Iterable[Pair]) -> list[tuple[Weight, Weight]]:
    return [(ours, theirs) for ours, theirs in pairs if isinstance(ours, Weight) and isinstance(theirs, Weight)]


def _tensors(item: Weight | Plain) -> tuple[Tensor, ...]:
    return item.tensors if isinstance(item, Weight) else (item.tensor,)
