"""obstore against moto's S3 on 127.0.0.1."""

from __future__ import annotations

import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SECRET = "do-not-print-me"
PLACE = "s3://models/kimi/tiny"


class Bucket:
    """A WSGI application: moto's, but for `faults`, each of which answers one request for an object in its place.

    `asked` are the paths of requests for objects, with the range."""

    def __init__(self) -> None:
        self.faults: deque[Callable[..., Any]] = deque()
        self.asked: list[tuple[str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].count("/") > 1:
            self.asked.append((environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
            if self.faults:
                return self.faults.popleft()(self._app, environ, start)
        return self._app(environ, start)

    def put(self, name: str, content: bytes) -> None:
        self._send("PUT", name, content)

    def empty(self) -> None:
        """moto keeps what it has for the life of a process."""
        self._send("POST", "moto-api/reset", b"")

    def _send(self, method: str, name: str, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}  # moto would take it for a form
        request = urllib.request.Request(f"{self.url}/{name}", content, headers, method=method)
        urllib.request.urlopen(request, timeout=10).read()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
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


@pytest.fixture
def stored(bucket: Bucket, int4: Path) -> str:
    """The address of `int4`'s files."""
    for path in int4.rglob("*"):
        if path.is_file() and ".kconvert" not in path.parts:
            bucket.put(f"models/kimi/tiny/{path.relative_to(int4)}", path.read_bytes())
    bucket.asked.clear()
    return PLACE
