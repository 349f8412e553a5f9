"""Proof that a checkpoint is what another one was converted to: coverage, integrity and parity.

Parity goes a way of its own: never through the kernels that wrote the output, but through compressed-tensors and torch.
AMX weights are compared as all others, once both sides go by the same names, see proof.amx.
"""

from __future__ import annotations

import filecmp
import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kconvert.address import anywhere, is_remote, open_checkpoint
from kconvert.checkpoint.gguf_files import GgufCheckpoint, is_gguf
from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, STATE_DIR, what_finishes
from kconvert.checkpoint.source import Checkpoint, Reader
from kconvert.cluster.ray import Cluster, is_ray
from kconvert.dialects import DECLARING_FILES, QuantizationConfig, quantization_tables
from kconvert.errors import CheckFailed, KconvertError
from kconvert.formats.engines.amx import Amx
from kconvert.models.amx import is_amx
from kconvert.models.model import Model, Weight, understand
from kconvert.proof import mlx
from kconvert.proof.amx import open_packed
from kconvert.proof.declared import undeclared, unscaled
from kconvert.proof.digests import Listener
from kconvert.proof.gguf.metadata import compare_metadata
from kconvert.proof.gguf.tensors import open_related
from kconvert.proof.pairs import Pair, choose, relate
from kconvert.proof.parity.compare import Comparison, Standard, changes
from kconvert.proof.parity.comparing import (
    Advance,
    Comparing,
    Digests,
    Job,
    Outcome,
    fault_of,
    weights_of,
)
from kconvert.proof.parity.metrics import Spread
from kconvert.proof.parity.oracle import is_quick
from kconvert.proof.parity.shares import compared_by_ray
from kconvert.proof.parity.witnesses.registry import witness_of

if TYPE_CHECKING:
    from kconvert.proof.parity.metrics import Position

WORST = 10


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A few columns of a row on both sides, from `first` on, around the element that is furthest off in its weight."""

    weight: str
    at: Position
    first: int
    expected: tuple[float, ...]
    found: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """What was compared, and how it came out.

    `reference` says in words what the weights were held to; `weights` and `tensors` count those that were compared,
    `skipped` those that were not (a sample). `thorough`: the figures are of all values. `faults` are sentences, none of a good
    output; `notes` are no faults.
    `comparisons` are the weights', in natural order of their names; `spreads` their distributions by role and format;
    `worst` are those with the lowest SQNR of all that differ, the worst first. `digests` are the sha256 of the output's tensors
    that were read whole and in order, where these were asked for.
    """

    source: Model
    output: Model
    standard: Standard
    reference: str
    faults: tuple[str, ...]
    thorough: bool = True
    weights: int = 0
    tensors: int = 0
    skipped: int = 0
    side_files: int = 0
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    spreads: Mapping[tuple[str, str], Spread] = field(default_factory=dict)
    worst: tuple[Excerpt, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


def verify(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    standard: Standard | None = None,
    sample: float = 1.0,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    keep_going: bool = False,
    thorough: bool = True,
    digest: bool = False,
    advance: Advance | None = None,
    engine: str = "threads",
    ray_address: str | None = None,
) -> Report:
    """Compare a checkpoint with the one it was made of, directories or Hub ids; CheckFailed names the first fault.

    Errors are taken in f64, SQNR is in dB, see proof.parity.metrics. KconvertError when `source` is not sound or `output` is
    not there; an output that is not sound is a failed check.
    `standard` says what a weight is held to, by default to the very bytes that belong there. `sample` is the share of the
    tensors whose values are compared, the same ones every time and some of each role; `include` and `exclude` must be those
    of the conversion. With `keep_going` faults are collected in the report; of an output that cannot be read it has one.
    Every value is compared; unless `thorough`, figures are of some rows and of what differs. With `digest` the report has what
    a certificate needs, and the output need not be read again for it. `advance` gets bytes of output compared.
    With the `engine` "ray" the workers of a Ray cluster, which see both, compare: that of `ray_address`, by default the one at
    hand, or a new one of this machine. The report is the same.
    """
    by_ray = is_ray(engine, ray_address)
    include, exclude, standard = tuple(include), tuple(exclude), standard or Standard()
    whole, original = _open_source(source, include, exclude)
    lenient = bool(include or exclude or keep_going)
    try:
        expected, converted, notes = _open_output(original, whole, output, lenient)
    except CheckFailed as unreadable:
        return _unreadable(original, Path(output), standard, unreadable, keep_going)
    (pairs, faults), differences = relate(expected, converted), tuple(_side_file_faults(expected, converted))
    said = compare_metadata(whole, converted.checkpoint)
    faults += [*(differences if standard.exact else ()), *said.faults]
    tally = _Tally(converted.checkpoint.title, keep_going, faults)
    tally.check()
    chosen, make = choose(pairs, sample), partial(_job, standard, thorough, digest)
    job = make(original, converted, chosen)
    again = partial(_again, anywhere(source), anywhere(output), include, exclude, lenient, sample, make)
    worst = _compare(job, tally, advance or (lambda nbytes: None), again if by_ray else None, ray_address)
    return Report(
        original,
        converted,
        standard,
        _reference(tally.comparisons, chosen),
        tuple(tally.faults),
        thorough or not standard.exact,  # limits are on figures
        weights=len(tally.comparisons),
        tensors=len(chosen) - len(tally.comparisons),
        skipped=len(pairs) - len(chosen),
        side_files=len(expected.checkpoint.side_files),
        dropped=tuple(tensor.name for tensor in original.dropped),
        notes=(*notes, *changes(tally.comparisons), *said.notes, *(() if standard.exact else differences)),
        comparisons=tuple(tally.comparisons),
        spreads=tally.spreads,
        worst=worst,
        digests=tally.digests,
    )


def _open_source(source: str | os.PathLike[str], include: Iterable[str], exclude: Iterable[str]) -> tuple[Model, Model]:
    """All of it, which is sound, and what is chosen."""
    whole = understand(open_checkpoint(source))
    original = whole.select(include, exclude)
    original.checkpoint.check_index()
    return whole, original


def _job(standard: Standard, thorough: bool, digest: bool, original: Model, converted: Model, pairs: list[Pair]) -> Job:
    ours, theirs = original.checkpoint, converted.checkpoint
    declared = partial(_declaration_faults, converted)
    files = ours.files, theirs.files
    forks = ours.directory is not None and theirs.directory is not None
    return Job(pairs, ours.reader(), _reader(theirs, digest), standard, thorough, declared, files, forks)


def _again(
    source: str,
    output: str,
    include: Iterable[str],
    exclude: Iterable[str],
    lenient: bool,
    sample: float,
    make: Callable[[Model, Model, list[Pair]], Job],
) -> Job:
    """The job of `verify` in another process, which need not look at the files beside the weights."""
    whole, original = _open_source(source, include, exclude)
    expected, converted, _ = _open_output(original, whole, output, lenient)
    return make(original, converted, choose(relate(expected, converted)[0], sample))


def _reader(checkpoint: Checkpoint, digest: bool) -> Reader:
    reader = checkpoint.reader()
    return Listener(reader, checkpoint.tensors.values()) if digest else reader


def _unreadable(original: Model, output: Path, standard: Standard, fault: CheckFailed, keep_going: bool) -> Report:
    """The report of an output that cannot be read, if one is wanted in spite of that."""
    if not keep_going:
        raise fault
    nothing = Checkpoint(output, {}, {}, {}, {}, ())
    found = replace(original, checkpoint=nothing, quantization=QuantizationConfig(), weights=(), plain=())
    return Report(original, found, standard, "nothing, as it cannot be read", (str(fault),))


@dataclass
class _Tally:
    """What the comparisons of a run have brought so far; unless it is to `keep_going`, the first fault ends it."""

    root: Path
    keep_going: bool
    faults: list[str]
    comparisons: list[Comparison] = field(default_factory=list)
    spreads: dict[tuple[str, str], Spread] = field(default_factory=dict)
    digests: Digests = field(default_factory=dict)

    def add_all(self, outcomes: Iterable[tuple[Outcome, Digests]]) -> None:
        for outcome, heard in outcomes:
            self.digests |= heard
            self.add(outcome)

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome, tuple):
            comparison, spread = outcome
            key = comparison.role, comparison.output_format
            self.comparisons.append(comparison)
            self.spreads[key] = self.spreads.get(key, Spread()) + spread
        if fault := fault_of(outcome):
            self.faults.append(f"{self.root}: {fault}")
            self.check()

    def check(self) -> None:
        if self.faults and not self.keep_going:
            raise CheckFailed(self.faults[0])


def _open_output(
    original: Model, whole: Model, output: str | os.PathLike[str], partial: bool
) -> tuple[Model, Model, tuple[str, ...]]:
    """What of the source, chosen of the `whole`, should be in the checkpoint to be verified; that checkpoint; and notes on how
    the two relate.

    Whatever is unsound about it is a failed check, not bad input; but there must be something.
    """
    path = Path(output)
    if is_amx(path):
        return open_packed(original, path)
    if is_gguf(path):
        return open_related(original, whole, path)
    if not path.is_dir() and not is_remote(output):
        open_checkpoint(output)  # says what is wrong
    # Our conversions write config.json and the index last; others may have a single file and no index.
    wanted = (CONFIG_NAME, INDEX_NAME) if (path / STATE_DIR).is_dir() else (CONFIG_NAME,)
    missing = [name for name in wanted if not (path / name).exists()]
    if path.is_dir() and missing:
        begun = (path / STATE_DIR).is_dir() and not any(path.glob("*.safetensors"))  # there may be GGUF files to come
        lacks = "weights yet" if begun else missing[0]
        raise CheckFailed(
            f"{path} is unfinished, it has no {lacks}; {what_finishes(path) or 'run the conversion again'}"
        )
    try:
        converted = understand(open_checkpoint(output), partial)
        converted.checkpoint.check_index()
        wanted_model, notes = mlx.expected(original, converted)
        return wanted_model, converted, notes
    except KconvertError as error:
        raise CheckFailed(f"the output is not sound: {error}") from None


def _reference(comparisons: Iterable[Comparison], pairs: Iterable[Pair]) -> str:
    """What the weights were held to, and by whose code."""
    judges = {comparison.judged_by for comparison in comparisons}
    weights = weights_of(pairs)
    values = "the source's values"
    if any(witness_of(ours.format).by_library for ours, _ in weights):
        values += ", decompressed by compressed-tensors"
    if any(is_quick(ours) and witness_of(ours.format).by_library for ours, _ in weights):
        values = "the source's values, decompressed by the proof's own code and checked by compressed-tensors"
    if "limits" in judges:
        return f"{values}, within limits" if judges == {"limits"} else f"{values}, some within limits only"
    if "bytes" not in judges:
        return values
    if any(witness_of(theirs.format).has_many_spellings for _, theirs in weights):
        return f"{values}, or the reference encoding of them"
    by_own = any(witness_of(theirs.format).judges_quickly for _, theirs in weights)
    how = " (by the proof's own code, checked by the reference)" if by_own else ""
    return f"the reference encoding{how} of {values}"


def _declaration_faults(converted: Model) -> list[str]:
    """Where config.json and what the output holds do not belong together; nothing declares AMX weights and those of GGUF."""
    if isinstance(converted.checkpoint, GgufCheckpoint) or any(
        isinstance(weight.format, Amx) for weight in converted.weights
    ):
        return []
    if any(weight.format.quantised for weight in converted.weights):
        checkpoint = converted.checkpoint
        return [*undeclared(checkpoint), *unscaled(checkpoint), *mlx.misdeclared(checkpoint)]
    stale = [CONFIG_NAME] if any(quantization_tables(converted.checkpoint.config)) else []
    stale += [name for name in DECLARING_FILES if name in converted.checkpoint.left_out]
    root = converted.checkpoint.root
    faults = [
        f"{root / name} declares a quantisation, but no weight is quantised; remove the declaration" for name in stale
    ]
    return faults or list(undeclared(converted.checkpoint))


def _side_file_faults(expected: Model, output: Model) -> Iterator[str]:
    original, converted = expected.checkpoint, output.checkpoint
    for name in original.side_files:
        if name not in converted.side_files:
            yield f"{converted.root / name} is missing; the source has it"
        elif not filecmp.cmp(original.side_file(name), converted.side_file(name), shallow=False):
            yield f"{converted.root / name} differs from the source's"


def _compare(
    job: Job, tally: _Tally, advance: Advance, again: Callable[[], Job] | None, address: str | None
) -> tuple[Excerpt, ...]:
    """Fill the tally, by the cluster at the address where the job can be made again; what lies around the worst elements."""
    with Cluster(address) if again else nullcontext() as cluster, job.ours, job.theirs:
        elsewhere = partial(compared_by_ray, cluster, job, again, tally.keep_going) if cluster and again else None
        with Comparing(job, advance, elsewhere=elsewhere) as comparing:
            tally.add_all(comparing.outcomes())
            return tuple(_excerpts(job.pairs, tally.comparisons, comparing))


def _excerpts(pairs: Iterable[Pair], comparisons: Iterable[Comparison], comparing: Comparing) -> Iterator[Excerpt]:
    """Around the worst elements of the WORST weights."""
    ranked = {
        comparison.name: (comparison.errors.sqnr, comparison.errors.worst)
        for comparison in comparisons
        if comparison.errors.sqnr is not None
    }
    numbers = {pair[1].name: number for number, pair in enumerate(pairs) if isinstance(pair[1], Weight)}
    for name in heapq.nsmallest(WORST, ranked, key=lambda name: ranked[name][0] or 0.0):
        if (at := ranked[name][1]) is not None:
            first, (expected, found) = comparing.excerpt(numbers[name], at)
            yield Excerpt(name, at, first, expected, found)
