"""The sha256 of a checkpoint's tensors and files, as fast as they load: in threads, past the page cache."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.download import feed
from kconvert.checkpoint.safetensors import LENGTH, Tensor
from kconvert.checkpoint.source import Checkpoint, Reader

CHUNK = 8 << 20  # bytes at a time
SMALL = 1 << 16  # bytes that are not worth a read past the page cache
WAITING = 2  # threads beyond the number of cores, as some wait for the disk
AHEAD = 1000  # tensors that wait or are done while an earlier one is still at work


def tensor_digests(
    checkpoint: Checkpoint, tensors: Sequence[Tensor], advance: Callable[[int], None]
) -> Generator[str, None, None]:
    """The digest of each tensor's bytes, in their order; whoever has seen enough closes it."""
    local = threading.local()

    def digest(tensor: Tensor) -> str:
        if not hasattr(local, "buffers"):
            local.buffers = Buffers()
        found = _digest(reader, tensor, local.buffers)
        advance(tensor.nbytes)
        return found

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) + WAITING)
    with checkpoint.reader() as reader:
        try:
            pending: deque[Future[str]] = deque()
            for tensor in tensors:
                pending.append(pool.submit(digest, tensor))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _digest(reader: Reader, tensor: Tensor, buffers: Buffers) -> str:
    found = hashlib.sha256()
    if tensor.nbytes <= SMALL:
        found.update(reader.read(tensor.file, tensor.start, tensor.nbytes))
    else:
        for start in range(0, tensor.nbytes, CHUNK):
            size = min(CHUNK, tensor.nbytes - start)
            found.update(buffers.fetch(reader, "digest", tensor.file, tensor.start + start, size).data)
    return found.hexdigest()


class Listener(Reader):
    """A reader that digests the tensors which pass through it from beginning to end, in order, as far as they do."""

    def __init__(self, reader: Reader, tensors: Iterable[Tensor]) -> None:
        self._reader = reader
        self._tensors = {(tensor.file, tensor.start): tensor for tensor in tensors if tensor.nbytes}
        self._begun: dict[tuple[str, int], tuple[Tensor, hashlib._Hash]] = {}  # by where they go on
        self._heard: dict[str, str] = {}

    def heard(self) -> dict[str, str]:
        """The digests of the tensors that have passed since this was asked, by name; others begin anew."""
        found, self._heard, self._begun = self._heard, {}, {}
        return found

    def path(self, file: str) -> Path:
        return self._reader.path(file)

    def close(self) -> None:
        self._reader.close()

    def read(self, file: str, start: int, nbytes: int) -> bytes:
        found = self._reader.read(file, start, nbytes)
        self._listen(file, start, found)
        return found

    def fetch(self, file: str, start: int, nbytes: int, room: memoryview) -> memoryview:
        found = self._reader.fetch(file, start, nbytes, room)
        self._listen(file, start, found)
        return found

    def _listen(self, file: str, start: int, data: bytes | memoryview) -> None:
        begun = self._begun.pop((file, start), None)
        if begun is None and (tensor := self._tensors.get((file, start))) and tensor.name not in self._heard:
            begun = tensor, hashlib.sha256()
        if begun is None:
            return
        tensor, digest = begun
        digest.update(data)
        if (end := start + len(data)) == tensor.start + tensor.nbytes:
            self._heard[tensor.name] = digest.hexdigest()
        else:
            self._begun[file, end] = begun


def file_digest(checkpoint: Checkpoint, name: str) -> str:
    """Of a file beside the weights; of one with weights, all that belongs to no tensor: the header, and what lies between and
    behind them."""
    found = hashlib.sha256()
    if (weights := checkpoint.files.get(name)) is None:
        feed(found.update, checkpoint.side_file(name))
        return found.hexdigest()
    places = sorted((tensor.start, tensor.nbytes) for tensor in checkpoint.tensors.values() if tensor.file == name)
    with checkpoint.reader() as reader:
        position = 0
        for start, nbytes in (*places, (weights.nbytes, 0)):
            for first in range(position, start, CHUNK):
                found.update(reader.read(name, first, min(CHUNK, start - first)))
            position = start + nbytes
    return found.hexdigest()


def header_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Of the header, with the length before it, of each safetensors file."""
    with checkpoint.reader() as reader:
        return {file: _header_digest(reader, file) for file in checkpoint.files if file.endswith(".safetensors")}


def _header_digest(reader: Reader, file: str) -> str:
    (length,) = LENGTH.unpack(reader.read(file, 0, LENGTH.size))
    return hashlib.sha256(reader.read(file, 0, LENGTH.size + length)).hexdigest()
