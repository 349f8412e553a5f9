"""moto's S3 on 127.0.0.1, for obstore and for whoever else takes AWS's variables; with faults where a test wants them."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kconvert.stores import client

SECRET = "do-not-print-me"
Fault = Callable[..., Any]


class Request(NamedTuple):
    """`name` is the object's, with its bucket; empty of a bucket."""

    method: str
    name: str
    query: str

    @property
    def is_part(self) -> bool:
        """Whether it brings a part of a large object."""
        return self.method == "PUT" and "partNumber" in self.query


class Bucket:
    """A WSGI application: moto's, but for `faults`, each of which answers one GET of an object in its place, and for what
    `watch` makes of a request: a fault, or None to let it pass.

    `asked` are the paths of GETs of objects, with the range; `requests` are all that were let pass.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        self.faults: deque[Fault] = deque()
        self.watch: Callable[[Request], Fault | None] = lambda request: None
        self.asked: list[tuple[str, str]] = []
        self.requests: list[Request] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        bucket, _, key = environ["PATH_INFO"].strip("/").partition("/")
        request = Request(environ["REQUEST_METHOD"], f"{bucket}/{key}" if key else "", environ.get("QUERY_STRING", ""))
        if bucket == "moto-api":
            return self._app(environ, start)
        if request.method == "GET" and request.name:
            self.asked.append((environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
            if self.faults:
                return self.faults.popleft()(self._app, environ, start)
        if (fault := self.watch(request)) is not None:
            return fault(self._app, environ, start)
        self.requests.append(request)
        return self._app(environ, start)

    def put(self, name: str, content: bytes) -> None:
        self._send("PUT", name, content)

    def replace(self, place: str, name: str, content: bytes) -> None:
        """As somebody with credentials can."""
        self._objects(place).put(name, content)

    def remove(self, place: str, *names: str) -> None:
        self._objects(place).delete(names)

    def files(self, place: str, hidden: bool = False) -> dict[str, bytes]:
        """What lies below `s3://…`, by name; with `hidden` kconvert's state, too."""
        objects = self._objects(place)
        names = [name for name in objects.listed() if hidden or not name.startswith(".kconvert/")]
        return {name: objects.read(name) or b"" for name in names}

    def _objects(self, place: str) -> Any:
        from kconvert.stores.urls import parse_store_url
        from kconvert.stores.writing import Objects

        url = parse_store_url(place)
        assert url is not None
        return Objects(url)

    def sent(self, place: str) -> list[str]:
        """The names of the objects below `place` that were written, in the order in which they came to be there."""
        start = place.removeprefix("s3://") + "/"
        whole = [
            r
            for r in self.requests
            if (r.method == "PUT" and not r.query) or (r.method == "POST" and "uploadId" in r.query)
        ]
        return [request.name.removeprefix(start) for request in whole if request.name.startswith(start)]

    def empty(self) -> None:
        """moto keeps what it has for the life of a process."""
        self._send("POST", "moto-api/reset", b"")

    def put_files(self, root: Path, prefix: str) -> None:
        """What a checkpoint has, below a bucket and prefix."""
        for path in root.rglob("*"):
            if path.is_file() and ".kconvert" not in path.parts:
                self.put(f"{prefix}/{path.relative_to(root)}", path.read_bytes())

    def _send(self, method: str, name: str, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}  # moto would take it for a form
        request = urllib.request.Request(f"{self.url}/{name}", content, headers, method=method)
        urllib.request.urlopen(request, timeout=10).read()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """A server for one test, which this process and those that it starts know of; it has the bucket `models`."""
    from moto.s3 import models

    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    bucket = Bucket()
    for name in ("AWS_PROFILE", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": bucket.url,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    bucket.empty()
    bucket.put("models", b"")
    yield bucket
    bucket.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test has this, nobody waits before trying again."""
    pause = timedelta(milliseconds=1)
    monkeypatch.setattr(client, "WAITS", (0.01,) * 5)
    monkeypatch.setitem(client.RETRIES, "backoff", {"init_backoff": pause, "max_backoff": 5 * pause, "base": 2})


def status(code: str) -> Fault:
    """An answer that is none, `503 Slow Down`."""

    def fault(app: Fault, environ: dict[str, Any], start: Fault) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(code, [("Content-Type", "text/plain")])
        return [b"no"]

    return fault


def reset(app: Fault, environ: dict[str, Any], start: Fault) -> Iterable[bytes]:
    """A connection that ends without an answer, before the request was read."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError


def lost(app: Fault, environ: dict[str, Any], start: Fault) -> Iterable[bytes]:
    """What was asked for is done, and the answer never comes."""
    b"".join(app(environ, lambda *_: None))
    return reset(app, environ, start)


def hang(seconds: float) -> Fault:
    """No answer for a while, then none at all."""

    def fault(app: Fault, environ: dict[str, Any], start: Fault) -> Iterable[bytes]:
        time.sleep(seconds)
        return reset(app, environ, start)

    return fault


def short(app: Fault, environ: dict[str, Any], start: Fault) -> Iterable[bytes]:
    """Less of the body than was announced."""
    body = b"".join(app(environ, start))
    return [body[: len(body) // 2]]


def times(count: int, fault: Fault, matches: Callable[[Request], bool]) -> Callable[[Request], Fault | None]:
    """A `watch`: the first requests of a kind fail."""
    left = [count]

    def watch(request: Request) -> Fault | None:
        if not matches(request) or not left[0]:
            return None
        left[0] -= 1
        return fault

    return watch
