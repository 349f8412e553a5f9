"""Runs a plan: worker threads take tasks in order, each reads, decodes and encodes tile by tile, and writes.

A worker does all four by itself; with more workers than cores, reading and writing overlap the arithmetic, and the only
memory is each worker's few reused buffers. What every tile of a weight needs whole (matrices that lie across) the worker that
comes first reads for all tasks of the weight. The kernels and the system calls run without the GIL.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kconvert.checkpoint.buffers import Buffers, stay_on_a_node
from kconvert.checkpoint.files import PAGE
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Copy, Transcode
from kconvert.run.state.journal import Journal
from kconvert.run.tiles import (
    Once,
    Shared,
    Task,
    copied,
    cut,
    decode_straight,
    decoded,
    goes_straight,
    inputs_of,
    is_shared,
    reach_of,
    row_bytes,
    row_unit,
    task_size,
    tile_rows,
    wholes_of,
)
from kconvert.run.trace import Clock, Source, Trace, Watched
from kconvert.run.values import naming
from kconvert.run.writer import ShardWriter

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes

WAITING = 3  # workers beyond the number of cores, as some wait for the disk
DEFAULT_MEMORY = 256 << 20  # for buffers, all workers together
MAX_TASK = 24 << 20  # the disk takes few large requests sooner than many: few workers, large tasks
BASE_MEMORY = 120 << 20  # the interpreter, numpy, the kernels


class Observer(Protocol):
    """Who must hear how far a run has come; see run.mover. All but `stop` may wait, and may fail."""

    def admit(self, shard: str) -> None:
        """Before the first byte of a shard is written."""

    def finish(self, shard: str) -> None:
        """Once a shard is durable and in the journal."""

    def complete(self) -> None:
        """Once all shards are."""

    def stop(self, failure: BaseException) -> None:
        """The run ends here; whoever waits must not wait any longer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers there are and how many bytes of buffers each may have."""

    threads: int
    memory: int

    @classmethod
    def choose(cls, threads: int | None = None, memory: int | None = None) -> Limits:
        return cls(threads or len(os.sched_getaffinity(0)) + WAITING, memory or DEFAULT_MEMORY)

    @property
    def task_bytes(self) -> int:
        """Input and output of a task together."""
        return min(MAX_TASK, self.memory // self.threads)

    def peak(self, plan: Plan) -> int:
        """What a run of `plan` needs in bytes of RAM, about."""
        return BASE_MEMORY + max(map(self._footprint, _kinds(plan)), default=self.threads * MAX_TASK)

    def _footprint(self, step: Transcode) -> int:
        """Of tasks of this kind. What these have in common is in memory for as many weights as they are of: tasks begin in
        order."""
        rows = task_size(step, self.task_bytes)
        wholes = [part for part in step.source_parts if is_shared(part)]
        apart = sum(part.nbytes for part in wholes if part.every) / max(step.rows, 1)
        buffers = int(rows * (row_bytes(step) - apart))
        weights = min(self.threads, (self.threads - 1) // max(-(-step.rows // rows), 1) + 2) if wholes else 0
        tile = 4 * tile_rows(step) * step.cols
        return self.threads * (buffers + tile) + weights * sum(part.nbytes for part in wholes)


@dataclass(frozen=True, slots=True)
class Worker:
    """What a thread has of its own: its view of the source, buffers and clock."""

    source: Watched
    buffers: Buffers
    clock: Clock


@dataclass
class Run:
    """One execution of a plan that writes `shards` of it: all that are missing, or those of one of many machines.

    `advance` is called with the bytes of output that have been written, and the `observers` in their order: who comes first has
    heard of a shard when the next one does.

    `inexact` counts for each weight the groups that lost something where the target format was to lose nothing, and by their
    own names scales of activations that became 1.
    """

    plan: Plan
    shards: Collection[str]
    source: Source
    journal: Journal
    limits: Limits
    advance: Callable[[int], None]
    observers: Sequence[Observer]
    trace: Trace
    inexact: Counter[str] = field(default_factory=Counter)
    _writers: dict[str, ShardWriter] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def execute(self) -> None:
        """Write these shards and no other. On an error unfinished shards are removed."""
        self._shards = {shard.name: shard for shard in self.plan.shards}
        tasks = self._tasks()
        try:
            self._finish_empty()
            with ThreadPoolExecutor(self.limits.threads, thread_name_prefix="worker") as pool:
                workers = [pool.submit(self._work, number, tasks) for number in range(self.limits.threads)]
                try:
                    for worker in workers:
                        worker.result()
                except BaseException as failure:
                    self._give_up(failure)
                    raise
            with self.trace.all_waiting("what is on its way"):
                for observer in self.observers:
                    observer.complete()
        finally:
            for writer in self._writers.values():
                writer.abandon()

    def _finish_empty(self) -> None:
        """Shards whose tensors have no elements are complete with their headers."""
        for shard in self.plan.shards:
            if shard.name in self.shards and shard.is_empty:
                self._begin(shard.name)
                self._finish(shard.name)

    def _tasks(self) -> Iterator[Task]:
        reaches: dict[int, Once] = defaultdict(Once)  # weights with the same mates have the same tuple of them
        for step in self.plan.steps:
            if any(place.file in self.shards for place in step.writes):
                last = step.rows if isinstance(step, Transcode) else step.nbytes
                count = task_size(step, self.limits.task_bytes)
                starts = range(0, max(last, 1), count)
                shared, reach = Shared(len(starts)), reaches[id(step.mates) if isinstance(step, Transcode) else 0]
                for first in starts:
                    yield Task(step, first, min(first + count, last), shared, reach)

    def _work(self, number: int, tasks: Iterator[Task]) -> None:
        stay_on_a_node(number)
        clock = self.trace.clock()
        worker = Worker(Watched(self.source, clock), Buffers(), clock)
        try:
            while not self._stop.is_set():
                with self._lock:
                    task = next(tasks, None)
                if task is None:
                    return
                if isinstance(task.step, Transcode):
                    self._transcode(task.step, task, worker)
                else:
                    self._copy(task.step, task.first, task.last, worker)
        except BaseException as failure:
            self._give_up(failure)
            raise

    def _give_up(self, failure: BaseException) -> None:
        self._stop.set()
        for observer in self.observers:
            observer.stop(failure)

    def _copy(self, step: Copy, first: int, last: int, worker: Worker) -> None:
        source, target = step.reads[0], step.writes[0]
        data = copied(step, first, last, worker.source, worker.buffers)
        if (source.start - target.start) % PAGE:
            moved = worker.buffers.take("out.0", last - first, target.start + first)
            moved[:] = data
            data = moved
        self._write(target.file, target.start + first, data, worker.clock)

    def _transcode(self, step: Transcode, task: Task, worker: Worker) -> None:
        first, last = task.first, task.last
        reach = task.reach.get(lambda: self._reach(step, worker)) if step.mates else None
        outputs = self._outputs(step, first, last, worker.buffers)
        if reach is not None:
            step.target.settle(reach, outputs)
        with task.shared.held(lambda: wholes_of(step, worker.source, is_shared)) as wholes:
            lost = self._fill(step, first, last, wholes, outputs, worker)
        if lost:
            with self._lock:
                self.inexact[step.name] += lost
        for part, place, data in zip(step.target_parts, step.writes, outputs, strict=True):
            if part.every is not None or first == 0:
                self._write(place.file, place.start + part.span(step.rows, first, last)[0], data, worker.clock)

    def _fill(
        self, step: Transcode, first: int, last: int, wholes: Mapping[int, Bytes], outputs: list[Bytes], worker: Worker
    ) -> int:
        """Make these rows of all outputs, tile by tile; returns the sum of what `encode` says."""
        inputs, clock = inputs_of(step, first, last, wholes, worker.source, worker.buffers), worker.clock
        if step.target.takes_codes(step.source):
            with (
                clock.on("encode", step.name),
                naming(f"{step.title} cannot be written as {step.target.label}", first, last),
            ):
                lost = step.target.recode(step.source, inputs, last - first, step.cols, outputs)
            for part in step.target.stand_ins(inputs, outputs) if first == 0 else ():
                self.inexact[part.tensor_of(step.name)] = 1  # of one task
            return lost
        if goes_straight(step, inputs):
            with clock.on("decode", step.name):
                decode_straight(step, inputs, first, last, outputs[0])
            return 0
        lost = 0
        for row, stop, tile in clock.each("decode", step.name, decoded(step, inputs, first, last, worker.buffers)):
            with (
                clock.on("encode", step.name),
                naming(f"{step.title} cannot be written as {step.target.label}", row, stop),
            ):
                lost += step.target.encode(tile, cut(step.target_parts, outputs, step.rows, first, row, stop))
        return lost

    def _reach(self, step: Transcode, worker: Worker) -> float:
        """The largest magnitude of the values of the step's mates, or what their scales say that none is above."""
        mates = (Transcode(*mate, step.target) for mate in step.mates)
        return max(reach_of(mate, worker.source, worker.buffers, self.limits.task_bytes) for mate in mates)

    def _outputs(self, step: Transcode, first: int, last: int, buffers: Buffers) -> list[Bytes]:
        """Room for the bytes that these rows are in every part."""
        rooms: list[Bytes] = []
        for part, place in zip(step.target_parts, step.writes, strict=True):
            start, stop = part.span(step.rows, first, last)
            room = buffers.take(f"out.{sum(map(bool, map(len, rooms)))}", stop - start, place.start + start)
            if part.constant is not None:
                room[:] = np.frombuffer(part.constant, np.uint8)
            rooms.append(room)
        return rooms

    def _write(self, file: str, offset: int, data: Bytes, clock: Clock) -> None:
        if file not in self.shards or not len(data):
            return
        if file not in self._writers:
            with clock.on("wait", file):
                for observer in self.observers:
                    observer.admit(file)
        with self._lock:
            writer = self._writers.get(file)
            if writer is None:
                writer = self._begin(file)
        with clock.on("write", file):
            if writer.write(data.data, offset):
                self._finish(file)
        self.advance(len(data))

    def _begin(self, file: str) -> ShardWriter:
        shard = self._shards[file]
        path = self.journal.destination / file
        partial = self.journal.partial(file)
        self._writers[file] = ShardWriter(path, partial, shard.header, shard.nbytes, shard.padding)
        return self._writers[file]

    def _finish(self, file: str) -> None:
        self._writers[file].commit()
        with self._lock:
            del self._writers[file]
        self.journal.record(file)
        for observer in self.observers:
            observer.finish(file)


def warm_up(plan: Plan) -> None:
    """Load the compiled kernels that `plan` needs, by a tile of zeros for each pair of formats.

    The first time on a machine numba has to compile them, for seconds; in a thread of its own that passes while tensors are
    copied.
    """
    for step in {(type(s.source), type(s.target)): s for s in _kinds(plan)}.values():
        rows = min(step.rows, row_unit(step))
        inputs, outputs = (
            [np.zeros(part.span(step.rows, 0, rows)[1], np.uint8) for part in parts]
            for parts in (step.source_parts, step.target_parts)
        )
        tile = np.zeros((rows, step.cols), np.float32)
        step.target.settle(0.0, outputs)
        with suppress(ValueError):  # zeros may be no values that the format can spell
            if step.target.takes_codes(step.source):
                step.target.recode(step.source, inputs, rows, step.cols, outputs)
                continue
            if goes_straight(step, inputs):
                decode_straight(step, inputs, 0, rows, outputs[0])
                continue
            step.source.decode(inputs, 0, tile)
            step.target.encode(tile, outputs)


def _kinds(plan: Plan) -> list[Transcode]:
    """One step for each shape and pair of formats; a large plan has 70,000 steps of a handful of kinds."""
    return list({(s.rows, s.cols, s.source, s.target): s for s in plan.steps if isinstance(s, Transcode)}.values())
