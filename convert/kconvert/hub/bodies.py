"""The bytes of a file, received where they belong.

The request is huggingface_hub's: its session knows the token, redirects, proxies and certificates. The body of a large answer
is read from the connection below it, which the client makes known for such uses (the extension `network_stream` of httpx), for
a fraction of the time on the CPU: the client's own way copies every byte several times, 64 KiB at a time.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from kconvert.checkpoint.remote import Sink, pour
from kconvert.hub.ids import HubId
from kconvert.version import __version__

# httpx2, with huggingface_hub 1.x httpx; both may be installed.
httpx: Any = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

LARGE = 4 << 20  # bytes of an answer that are worth a connection of their own, which nobody can use again


def receive(place: HubId, file: str, start: int, stop: int, sink: Sink) -> Iterator[int]:
    """One attempt at bytes `start` to `stop` (exclusive) of a file: how many have come to `sink`, each time some have.

    It may end early, or raise what the client raises.
    """
    url = hf_hub_url(place.repo, file, revision=place.revision, endpoint=constants.ENDPOINT)
    headers = build_hf_headers(library_name="kconvert", library_version=__version__)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise httpx.RemoteProtocolError("the answer is another range")
        # Who ignores the range sends the file from its beginning.
        skip, wanted = (0 if response.status_code == 206 else start), stop - start
        line = _line(response, skip + wanted) if wanted >= LARGE else None
        chunks = response.iter_bytes()  # which closes the connection when it is let go
        for chunk in chunks:
            piece = memoryview(chunk)[skip : skip + wanted]
            skip = max(0, skip - len(chunk))
            if piece:
                pour(piece, sink)
                wanted -= len(piece)
                yield len(piece)
            if not wanted:
                return
            if line is not None and not skip:  # the client has given out all that it had read
                break
        if line is not None:
            yield from _read(line, wanted, sink)


def _line(response: Any, nbytes: int) -> socket.socket | None:
    """The connection that an answer comes by; None where its bytes are not those of the body, of which `nbytes` are wanted."""
    stream = response.extensions.get("network_stream")
    length = response.headers.get("Content-Length", "")
    coded = any(name in response.headers for name in ("Content-Encoding", "Transfer-Encoding"))
    if stream is None or coded or response.http_version != "HTTP/1.1" or not length.isdecimal() or int(length) < nbytes:
        return None
    line = stream.get_extra_info("socket")
    nested = isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject)  # TLS by way of a proxy that has TLS itself
    return line if isinstance(line, socket.socket) and not nested else None


def _read(line: socket.socket, wanted: int, sink: Sink) -> Iterator[int]:
    """The next bytes of a connection; see `receive`."""
    while wanted:
        room = sink.room()[:wanted]
        try:
            count = line.recv_into(room)
        except TimeoutError:
            raise httpx.ReadTimeout("the answer stopped coming") from None
        except OSError:
            raise httpx.ReadError("the connection broke off") from None
        if not count:
            return
        sink.took(count)
        wanted -= count
        yield count
