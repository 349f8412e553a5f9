"""Work for several processes: threads that call torch for a few hundred microseconds at a time mostly wait for each other."""

from __future__ import annotations

import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kconvert.errors import KconvertError

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

Thing = TypeVar("Thing")
SHARE = 256 << 20  # bytes to read that are worth a process
WAITING = 1  # processes beyond the number of cores, as some wait for the disk in spite of one_ahead
AHEAD = 1000  # answers that wait or are there while an earlier one is still being worked at
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def one_ahead(work: Callable[[int], Thing], count: int) -> Generator[Thing, None, None]:
    """`work(0)` to `work(count - 1)`; while one is looked at a thread is at the next."""
    from concurrent.futures import ThreadPoolExecutor  # here, as every command imports this module

    if count < 2:
        yield from map(work, range(count))
        return
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(work, 0)
        for number in range(1, count):
            found, pending = pending.result(), thread.submit(work, number)
            yield found
        yield pending.result()


def worthwhile(nbytes: int, cores: int | None = None) -> int:
    """How many processes reading so many bytes is worth on so many cores, or all; 0 where it is done sooner here."""
    count = min((cores or len(os.sched_getaffinity(0))) + WAITING, nbytes // SHARE)
    return count if count > 1 else 0


class Answer(Protocol):
    def result(self) -> Any:
        """What was asked for, once it is there; or raises what went wrong."""


class Crew:
    """So many forks of this process, each of which can do what `job` can; with none it is done here, when it is looked at.

    What a task raises is raised by its answer. Leaving the context ends the forks, and what has not begun is not done.
    """

    def __init__(self, processes: int, job: object) -> None:
        self._job = job
        self._pool = _pool(processes, job) if processes else None

    def ask(self, task: str, *arguments: Any) -> Answer:
        """`job.task(*arguments)`, by whichever of them is free first."""
        if self._pool is None:
            return _Here(partial(getattr(self._job, task), *arguments))
        return _There(self._pool.submit(_call, task, *arguments))

    def each(self, task: str, count: int) -> Iterator[Any]:
        """`job.task(0)` to `job.task(count - 1)`, in this order; begun at once, AHEAD of them."""
        numbers = iter(range(count))
        pending = deque(self.ask(task, number) for number in islice(numbers, AHEAD))
        return self._results(task, pending, numbers)

    def _results(self, task: str, pending: deque[Answer], numbers: Iterator[int]) -> Iterator[Any]:
        while pending:
            found = pending.popleft().result()
            pending.extend(self.ask(task, number) for number in islice(numbers, 1))
            yield found

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _pool(processes: int, job: object) -> ProcessPoolExecutor:
    from concurrent.futures import ProcessPoolExecutor  # here, as every command imports this module
    from multiprocessing import get_context

    return ProcessPoolExecutor(processes, get_context("fork"), _begin, (job,))


@dataclass(frozen=True)
class _Here:
    work: Callable[[], Any]

    def result(self) -> Any:
        return self.work()


@dataclass(frozen=True)
class _There:
    future: Future[Any]

    def result(self) -> Any:
        from concurrent.futures.process import BrokenProcessPool

        try:
            return self.future.result()
        except BrokenProcessPool:
            raise KconvertError(
                "a process of the comparison was killed, probably for want of memory; free some and run the command again"
            ) from None


_job: object  # in a fork, what it is there for


def _begin(job: object) -> None:
    """A fork leaves it to its parent to be interrupted, and ends with it."""
    import ctypes

    from kconvert.proof.parity import library

    global _job  # noqa: PLW0603
    _job = job
    library.apart()
    gc.freeze()  # a collection would write to, and so copy, every object that the parent has
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Memory given back to the kernel would come back as new pages, which cost more than the arithmetic on them.
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _call(task: str, *arguments: Any) -> Any:
    return getattr(_job, task)(*arguments)
