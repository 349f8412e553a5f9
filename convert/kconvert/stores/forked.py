"""Reads in a process that was forked from one that has used a store.

obstore has threads, which a fork does not take along: there every call of it stands still for ever, of a new store as well. So
a forked process starts another one, without a fork, that reads in its place, and ends when it does. Each read has a socket of
its own, which is handed to that process with what is wanted.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

from kconvert.checkpoint.remote import Sink, pour
from kconvert.errors import KconvertError
from kconvert.interpreter import python
from kconvert.stores.client import CHUNK, open_store, transfer
from kconvert.stores.urls import StoreUrl

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MOST = 1 << 16  # bytes of what is wanted, names of objects have 1024


class Wanted(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of an object; see client.transfer."""

    place: StoreUrl
    stamp: str | None
    file: str
    start: int
    stop: int


class _Sending:
    """A sink whose bytes go on to who has asked for them."""

    def __init__(self, answers: Connection) -> None:
        self._answers, self._room = answers, memoryview(bytearray(CHUNK))

    def room(self) -> memoryview:
        return self._room

    def took(self, count: int) -> None:
        self._answers.send_bytes(self._room[:count])


@dataclass(frozen=True)
class _Reader:
    """The process that reads for this one, and the way to it."""

    process: subprocess.Popen[bytes]
    way: socket.socket

    def ask(self, wanted: Wanted, answers: int) -> None:
        socket.send_fds(self.way, [pickle.dumps(wanted)], [answers])


class _Readers:
    """That of this process, if it has one by now; forked processes begin without."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._found: _Reader | None = None

    def ask(self, wanted: Wanted, answers: int) -> None:
        """Hand this to the reader, or to another one where that has ended."""
        with self._lock:
            if self._found is not None:
                try:
                    self._found.ask(wanted, answers)
                    return
                except ConnectionError:
                    self._found.process.wait()
            self._found = _start()
            self._found.ask(wanted, answers)


_own = _Readers()


def read(wanted: Wanted, sink: Sink) -> None:
    """Bring these bytes to `sink`; KconvertError when they cannot be had. From any thread."""
    here, there = socket.socketpair()
    with there:
        _own.ask(wanted, there.fileno())
    with Connection(here.detach()) as answers:
        try:
            while chunk := answers.recv_bytes():
                pour(chunk, sink)
            fault = answers.recv()
        except (EOFError, ConnectionError):
            fault = f"{wanted.place}: cannot read {wanted.file}, the process that does was ended; read it again"
    if fault is not None:
        raise KconvertError(fault)


def _start() -> _Reader:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = python(f"from {__name__} import serve; serve()")
    with there:
        return _Reader(subprocess.Popen(command, stdin=there.fileno()), here)


def serve() -> None:
    """Answer what comes by stdin until nobody is there."""
    with socket.socket(fileno=0) as requests:
        while True:
            text, descriptors, *_ = socket.recv_fds(requests, MOST, 1)
            if not text:
                return
            arguments = pickle.loads(text), Connection(descriptors[0])
            threading.Thread(target=_answer, args=arguments, daemon=True).start()


def _answer(wanted: Wanted, answers: Connection) -> None:
    with answers, suppress(ConnectionError):  # who has asked may be gone
        fault = None
        try:
            transfer(wanted.place, _store(wanted.place), *wanted[1:], _Sending(answers))
        except KconvertError as error:
            fault = str(error)
        answers.send_bytes(b"")
        answers.send(fault)


@lru_cache
def _store(place: StoreUrl) -> ObjectStore:
    return open_store(place)
