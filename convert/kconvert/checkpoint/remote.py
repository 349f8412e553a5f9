"""A checkpoint that is elsewhere, without downloading it: a list of its files, headers and tensors by ranges of bytes.

The headers say all that the index does, and a large model's has 20 MB: it is only read where it must decide which files
belong to the checkpoint, and before weights are.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from kconvert.checkpoint.index import compare_index, read_weight_map
from kconvert.checkpoint.listing import INDEX_NAME, FileStat, Listing
from kconvert.checkpoint.safetensors import Tensor, read_header
from kconvert.checkpoint.source import Checkpoint, Reader, assemble
from kconvert.errors import KconvertError

T = TypeVar("T")
CONNECTIONS = 16  # at a time, for headers: each takes longer to answer than to arrive
FIRST_READ = (1 << 16, 1 << 21)  # at least and at most, of a header of unknown length
ANSWERS_IN = 10.0  # seconds, whoever takes connections, as for huggingface_hub; and as many to look up its name
PORTS = {"http": 80, "https": 443}
HEADER_TO_INDEX = 1.345  # bytes: a header says of a tensor dtype, shape and offsets, the index its file (K2: 1.34)


@lru_cache  # of those that answer
def check_endpoint(address: str, setting: str) -> None:
    """KconvertError where nobody takes connections at the address that the user gave by `setting`.

    What is mistyped never answers: the patience that outlasts a network's faults is not for that. Behind a proxy only this
    can tell.
    """
    scheme, host, port = parse_endpoint(address, setting)
    if {scheme, "all"} & getproxies().keys() and not proxy_bypass(host):
        return
    fault = _why_unreachable(host, port)
    if fault is not None:
        raise KconvertError(f"{setting} is {without_password(address)}, where {fault}; set it right, or leave it out")


def parse_endpoint(address: str, setting: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address that the user gave by `setting`; KconvertError where it has none."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or PORTS.get(parts.scheme)
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise KconvertError(
            f"{setting} is {without_password(address)!r}, which is no address; one is like https://host or http://host:port"
        )
    return parts.scheme, host, port


def without_password(address: str) -> str:
    """As it may be shown."""
    return re.sub("//[^/]*@", "//", address)


def _why_unreachable(host: str, port: int) -> str | None:
    """Why no connection is to be had, or None.

    All addresses of a host are tried at once: some may lead nowhere from here, as those of IPv6 where only IPv4 goes.
    """
    try:
        found = _first([lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        if found is not None and _first([partial(_connect, *address) for address in found]):
            return None
    except (socket.gaierror, UnicodeError):
        return f"no host {host!r} is known"
    except OSError as error:
        return f"nobody takes connections ({error.strerror or 'no answer in time'})"
    return f"nobody answered within {ANSWERS_IN:.0f} seconds"


def _connect(family: int, kind: int, protocol: int, _: str, address: Any) -> bool:
    with socket.socket(family, kind, protocol) as line:
        line.settimeout(ANSWERS_IN)
        line.connect(address)
    return True


def _first(calls: Sequence[Callable[[], T]]) -> T | None:
    """What the first call that succeeds returns, or else what the last one raises; None where they take longer than ANSWERS_IN.

    A resolver keeps to no time: nobody waits for the threads.
    """
    ended: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()
    latest = time.monotonic() + ANSWERS_IN

    def run(call: Callable[[], T]) -> None:
        try:
            ended.put((call(), None))
        except (OSError, UnicodeError) as error:
            ended.put((None, error))

    for call in calls:
        threading.Thread(target=run, args=(call,), daemon=True).start()
    fault: Exception | None = None
    for _ in calls:
        try:
            found, fault = ended.get(timeout=max(0.0, latest - time.monotonic()))
        except Empty:
            return None
        if fault is None:
            return found
    assert fault is not None
    raise fault


class Sink(Protocol):
    """Takes bytes in order, without another copy of them: they are received where they belong."""

    def room(self) -> memoryview:
        """For the next bytes; never empty while any are to come."""

    def took(self, count: int) -> None:
        """So many bytes have come into the room, from its beginning."""


class Memory:
    """A sink that fills `buffer`."""

    def __init__(self, buffer: bytearray | memoryview) -> None:
        self._left = memoryview(buffer)

    def room(self) -> memoryview:
        return self._left

    def took(self, count: int) -> None:
        self._left = self._left[count:]


def pour(data: bytes | memoryview, sink: Sink) -> None:
    """Give a sink bytes that are in memory already."""
    left = memoryview(data)
    while left:
        room = sink.room()[: len(left)]
        if not room:
            raise ValueError("there are more bytes than were to come")
        room[:] = left[: len(room)]
        sink.took(len(room))
        left = left[len(room) :]


class Transfer(Protocol):
    def __call__(self, file: str, start: int, stop: int, sink: Sink, stopped: threading.Event | None = None, /) -> None:
        """Bring bytes `start` to `stop` (exclusive) of a file to `sink`; KconvertError when they cannot be had, or
        `stopped` is set meanwhile."""


class Digest(Protocol):
    """Of a file's content, while its bytes pass."""

    def update(self, data: bytes | memoryview, /) -> None:
        """The next bytes."""

    def agrees(self) -> bool:
        """Whether the bytes so far are what the list of files says; True where it does not say."""


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """`listed` are all its files. `root` is no directory but names it in messages."""

    listed: Mapping[str, FileStat]

    @property
    def directory(self) -> None:
        return None

    def reader(self) -> Reader:
        return RangeReader(self.root, self.transfer)

    def has(self, name: str) -> bool:
        return name in self.listed

    def check_same(self, files: Iterable[str]) -> None:
        """Every transfer is of the content that was listed, or fails."""

    def check_index(self) -> None:
        if self.has(INDEX_NAME):
            listing = Listing(self.root, self.listed, lambda name: self.side_file(name).read_bytes())
            compare_index(listing, self.tensors, read_weight_map(listing))

    def transfer(self, file: str, start: int, stop: int, sink: Sink, stopped: threading.Event | None = None, /) -> None:
        """See Transfer."""
        raise NotImplementedError

    def digest(self, file: str) -> Digest:
        """Of nothing yet."""
        raise NotImplementedError

    def cached(self, file: str) -> Path | None:
        """Where the file is on this machine already, for good."""
        return None

    def cache(self, file: str) -> Path | None:
        """Where the file would be kept on this machine, for good; None where nothing is."""
        return None

    def keep(self, file: str) -> Path:
        """Where to read a file from that has just come to `cache`."""
        raise NotImplementedError


class RangeReader(Reader):
    """Reads of any range of bytes, each a request."""

    def __init__(self, root: Path, transfer: Transfer) -> None:
        super().__init__(root)
        self._transfer = transfer

    def _fill(self, file: str, descriptors: dict[str, int], start: int, buffer: memoryview, needed: int) -> None:
        self._transfer(file, start, start + needed, Memory(buffer))


def assemble_remote(listing: Listing, transfer: Transfer) -> Checkpoint:
    """See source.assemble; headers are read several at a time."""

    def headers(files: list[str]) -> Iterable[list[Tensor]]:
        guess = _header_bytes(listing.files, len(files))
        return pool.map(lambda file: _header(listing, file, transfer, guess), files)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return assemble(listing, headers, spare_index=True)


def _header_bytes(files: Mapping[str, FileStat], shards: int) -> int:
    """What a header should not exceed, by the size of the index; a longer one takes a second request."""
    index = files[INDEX_NAME].nbytes if INDEX_NAME in files else 0
    least, most = FIRST_READ
    return min(most, max(least, int(index / shards * HEADER_TO_INDEX)))


def _header(listing: Listing, file: str, transfer: Transfer, guess: int) -> list[Tensor]:
    head, size = bytearray(), listing.files[file].nbytes

    def read(start: int, nbytes: int) -> bytes:
        stop = start + nbytes
        if stop > len(head):
            more = bytearray(min(size, max(stop, guess)) - len(head))
            transfer(file, len(head), len(head) + len(more), Memory(more))
            head.extend(more)
        return bytes(head[start:stop])

    return read_header(f"{listing.root}/{file}", size, read, file)


def check_file_name(place: object, name: str) -> None:
    """Names come from whoever made the files; they become paths below directories of ours."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise KconvertError(
            f"{place} has a file called {name!r}, which could lead anywhere; do not trust this repository"
        )
