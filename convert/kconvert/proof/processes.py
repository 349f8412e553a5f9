"""Work for several processes: threads that call torch for a few hundred microseconds at a time mostly wait for each other."""

from __future__ import annotations

import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from kconvert.errors import KconvertError

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
SHARE = 256 << 20  # bytes to read that are worth a process
WAITING = 2  # processes beyond the number of cores, as some wait for the disk
AHEAD = 1000  # numbers that wait or are done while an earlier one is still at work
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def in_processes(work: Callable[[int], T], count: int, nbytes: int) -> Iterator[T]:
    """work(0) to work(count - 1), in this order, of which all together read `nbytes`: here if that is little, else in forks of
    this process. What `work` raises is raised here, and ends the others."""
    processes = min(len(os.sched_getaffinity(0)) + WAITING, nbytes // SHARE)
    if processes < 2:
        yield from map(work, range(count))
        return
    # Here, as every command imports this module.
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (work,)) as pool:
        try:
            pending: deque[Future[T]] = deque()
            for number in range(count):
                pending.append(pool.submit(_call, number))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            for future in pending:
                yield future.result()
        except BrokenProcessPool:
            raise KconvertError(
                "a process of the comparison was killed, probably for want of memory; free some and run the command again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[int], Any]  # in a fork, what it is there for


def _begin(work: Callable[[int], Any]) -> None:
    """A fork leaves it to its parent to be interrupted, and ends with it."""
    import ctypes

    global _work  # noqa: PLW0603
    _work = work
    gc.freeze()  # a collection would write to, and so copy, every object that the parent has
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Memory given back to the kernel would come back as new pages, which cost more than the arithmetic on them.
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _call(number: int) -> Any:
    return _work(number)
