"""A function called for many numbers on the machines of a Ray cluster, which starts again what a dead one had.

The function travels once, pickled, and what it returns; both are small. Nothing is put into Ray's object store: what the
function reads and writes lies where all machines see it.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import suppress
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from kconvert.errors import KconvertError
from kconvert.version import __version__

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
LOSSES = 20  # how often one task may lose its worker
LOOKS = 0.5  # seconds between two looks at what the tasks say
AT_HAND, HERE = "auto", "local"  # in the place of an address
PORT = 6379  # where Ray is unless it is told
STORE = 80 << 20  # bytes of a store that nothing is put into; the least that Ray takes


def is_ray(engine: str, address: str | None) -> bool:
    """Whether these two options ask for Ray; KconvertError where they do not go together."""
    if engine not in ("threads", "ray"):
        raise KconvertError(f"there is no engine {engine!r}; choose threads or ray")
    if engine != "ray" and address is not None:
        raise KconvertError("--ray-address is for --engine ray; give both, or leave it out")
    return engine == "ray"


class Work(Protocol[T_co]):
    """What is called with a number; it says by `tell` how much it has done, in bytes of all that the number stands for."""

    def __call__(self, number: int, tell: Callable[[int], None]) -> T_co: ...


class Cluster:
    """A connection to Ray, a context manager; without an address to the cluster at hand, or to a new one of this machine.

    `slots` is how many tasks run at a time, each with `cpus` of its node. KconvertError where there is no Ray.
    """

    def __init__(self, address: str | None = None, cpus: int | None = None) -> None:
        self._ray = _ray()
        self._joined = not self._ray.is_initialized()
        if self._joined:
            self._connect(address)
        nodes = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        self.cpus = cpus or min(filter(None, nodes), default=1)
        self.slots = max(sum(count // self.cpus for count in nodes), 1)

    def call(
        self, work: Work[T], numbers: Iterable[int], tell: Callable[[int], None]
    ) -> Generator[tuple[int, T], None, None]:
        """Each number with what `work` returns for it, as they are done; `tell` hears how much all have done since last time.

        What `work` raises is raised here, and ends the others, as closing this does.
        """
        ray, board = self._ray, Board(secrets.token_hex(8))
        options = {"num_cpus": self.cpus, "max_retries": LOSSES, "scheduling_strategy": "SPREAD"}
        task, pickled = ray.remote(**options)(_starter()), ray.cloudpickle.dumps(work)
        pending = {task.remote(__version__, pickled, number, board.name): number for number in numbers}
        done, told = 0, 0
        try:
            while pending:
                ready, _ = ray.wait([*pending], num_returns=len(pending), timeout=LOOKS)
                for ref in ready:
                    number = pending.pop(ref)
                    nbytes, value = self._get(ref, number)
                    done += nbytes
                    yield number, value
                total = done + board.read({*pending.values()})
                if total > told:  # who has been started again has done less for a while
                    tell(total - told)
                    told = total
        finally:
            for ref in pending:
                ray.cancel(ref, force=True)
            board.clear()

    def _get(self, ref: Any, number: int) -> Any:
        errors = self._ray.exceptions
        try:
            nbytes, value = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            said = str(error).partition("\n")[0]
            raise KconvertError(
                f"Ray has given up task {number} ({said}); see its logs, and whether the nodes have memory enough, and run the "
                "same command again; a conversion goes on from here"
            ) from None
        if nbytes is None:
            raise KconvertError(f"{value} has no kconvert; install version {__version__} on all nodes of the cluster")
        return nbytes, value

    def _connect(self, address: str | None) -> None:
        """Join a cluster: that of the address, that of RAY_ADDRESS, one that runs on this machine; or else start one here."""
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        named = address or os.environ.get("RAY_ADDRESS", AT_HAND)
        _check_address(named)
        try:
            if named != HERE:
                self._ray.init(address=named, **quiet)
                return
        except (ConnectionError, ValueError, RuntimeError) as error:
            if named != AT_HAND:
                said = str(error).partition("\n")[0]
                raise KconvertError(f"Ray does not let this process into its cluster at {named}: {said}") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # else 15, and whatever runs besides goes first; threads have 0
        self._ray.init(address=HERE, include_dashboard=False, object_store_memory=STORE, **quiet)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._joined:
            self._ray.shutdown()


class Board:
    """What tasks have said last, in the cluster's own table of keys: an actor would be a process, which takes a second to
    start. Where the table cannot be had, nothing is said."""

    def __init__(self, name: str) -> None:
        from ray.exceptions import RayError
        from ray.experimental import internal_kv

        self.name, self._table, self._faults = name, internal_kv, suppress(RayError)
        self._start = f"kconvert/{name}/"

    def write(self, number: int, nbytes: int) -> None:
        with self._faults:
            self._table._internal_kv_put(f"{self._start}{number}", str(nbytes))

    def read(self, numbers: Collection[int]) -> int:
        """The sum of what tasks of these numbers say."""
        with self._faults:
            keys = self._table._internal_kv_list(self._start)
            wanted = [key for key in keys if int(key.rpartition(b"/")[2]) in numbers]
            return sum(int(self._table._internal_kv_get(key) or 0) for key in wanted)
        return 0

    def clear(self) -> None:
        with self._faults:
            self._table._internal_kv_del(self._start, del_by_prefix=True)


def _starter() -> Callable[..., Any]:
    """What travels as code and not by name, for a node may have no kconvert."""

    def start(*arguments: Any) -> tuple[int | None, Any]:
        try:
            from kconvert.cluster.ray import perform
        except ImportError:
            return None, __import__("os").uname().nodename
        return perform(*arguments)

    return start


def perform(version: str, pickled: bytes, number: int, name: str) -> tuple[int, Any]:
    """A task, in a worker of the cluster: the bytes that the work has told of, and what it returns."""
    host = os.uname().nodename
    if version != __version__:
        raise KconvertError(f"{host} has kconvert {__version__}, and this is {version}; install the same on all nodes")
    board, told, last = Board(name), 0, time.monotonic()

    def tell(nbytes: int) -> None:
        nonlocal told, last
        told += nbytes
        if (now := time.monotonic()) - last > LOOKS:
            last = now
            board.write(number, told)

    try:
        value = _unpickled(pickled)(number, tell)
        return told, value
    except KconvertError as error:
        raise type(error)(f"{error} (on {host})") from None


@lru_cache(1)
def _unpickled(pickled: bytes) -> Any:
    """The same object for all tasks of a worker, so that it can keep what it needs for each."""
    return _ray().cloudpickle.loads(pickled)


def _check_address(address: str) -> None:
    """KconvertError where nobody listens; Ray would look for minutes, and then end this process."""
    if address in (AT_HAND, HERE):
        return
    try:
        place = urlsplit(address if "://" in address else f"ray://{address}")
        socket.create_connection((place.hostname, place.port or PORT), 10).close()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise KconvertError(
            f"there is no Ray cluster at {address} ({said}); start it, or give the HOST:PORT that `ray start --head` has told"
        ) from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise KconvertError("--engine ray needs Ray; pip install 'kconvert-toolkit[ray]'") from None
    return ray
