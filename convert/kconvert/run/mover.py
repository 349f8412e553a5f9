"""Threads that move files while the engine works, and hear from it how far it has come; see engine.Observer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from kconvert.run.budget import Ledger

Self = TypeVar("Self", bound="Mover")


class Mover:
    """A context manager: its threads end with it. What one of them fails with is what whoever waits for the ledger gets."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def _start(self, work: Callable[[], None], count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._guard, args=(work,), name=work.__name__, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:
            self._ledger.fail(failure)

    def admit(self, shard: str) -> None:
        """Nothing is in the way of a shard, unless a mover says so."""

    def finish(self, shard: str) -> None:
        """Nothing follows from it, unless a mover says so."""

    def stop(self, failure: BaseException) -> None:
        self._stopped.set()
        self._ledger.fail(failure)

    def complete(self) -> None:
        """Wait until everything is where it belongs; raises what has gone wrong on the way."""
        self._join()
        self._ledger.check()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.stop(error)
        self._join()
