"""A small Hugging Face Hub on 127.0.0.1: repositories with commits, ranges, LFS uploads, and faults on demand.

It serves the calls that the real huggingface_hub client makes of it, and nothing else. Content lies in memory, or in a file
that may be sparse. Used by the tests of this folder and by the benchmarks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 16
BURST = 0.02  # seconds for which a line makes up, when nobody had anything ready for it


@dataclass
class Content:
    """A file of a commit: its bytes, or a path to them. `sha256` can be given for what is too big to read."""

    data: bytes | Path
    is_large: bool
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.is_large and not self.sha256:
            self.sha256 = hashlib.sha256(self.read(0, self.size)).hexdigest()

    @cached_property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size

    @cached_property
    def blob(self) -> str:
        """What git calls it; of a large file the pointer would be hashed, any name will do."""
        if self.is_large:
            return hashlib.sha1(self.sha256.encode()).hexdigest()
        return hashlib.sha1(b"blob %d\0" % self.size + self.read(0, self.size)).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.blob

    def read(self, start: int, stop: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[start:stop]
        with open(self.data, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass
class Repository:
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Content], branch: str = "main", message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)} {id(self)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def head(self, branch: str = "main") -> dict[str, Content]:
        return self.commits[self.branches[branch]] if branch in self.branches else {}


@dataclass
class Request:
    """One request as it came, and what was sent for it."""

    method: str
    path: str
    span: str
    token: str
    coding: str = ""
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with the first `times` requests that match."""

    pattern: str
    act: Callable[[Handler], bool]  # True: it has answered
    method: str = "GET"
    times: int = 1


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what it is for."""


class Hub:
    """`with Hub() as hub`: serves until the end of the block; `hub.url` is its endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.token = ""
        self.speed = 0.0  # bytes a second of all answers together, as a line has; 0 for no limit
        self._free = 0.0  # when the line has sent what it was given
        self.lock = threading.Lock()
        self._server = Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, folder: Path, branch: str = "main", **options: Any) -> str:
        """A commit with the files of a folder, without kconvert's own; returns its name."""
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        names = {str(path.relative_to(folder)): path for path in paths}
        files = {
            name: Content(path, is_large=name.endswith(".safetensors"))
            for name, path in names.items()
            if not name.startswith(".kconvert")
        }
        return self.put(repo, files, branch, **options)

    def put(self, repo: str, files: dict[str, Content], branch: str = "main", **options: Any) -> str:
        found = self.repos.setdefault(repo, Repository())
        for name, value in options.items():
            setattr(found, name, value)
        return found.commit(files, branch)

    def fail(self, pattern: str, act: Callable[[Handler], bool], times: int = 1, method: str = "GET") -> None:
        """Let the next `times` requests go wrong whose path matches `pattern`."""
        self.faults.append(Fault(pattern, act, method, times))

    def sent(self, pattern: str = "") -> int:
        """Bytes of answers to requests whose path matches."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.path))

    def count(self, pattern: str, method: str = "GET") -> int:
        return sum(r.method == method and bool(re.search(pattern, r.path)) for r in self.requests)

    def pace(self, nbytes: int) -> None:
        """Wait until the line has sent so many bytes more."""
        if self.speed:
            with self.lock:
                self._free = max(self._free, time.monotonic() - BURST) + nbytes / self.speed
            time.sleep(max(0.0, self._free - time.monotonic()))

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    limit: int | None = None
    flip = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        self.limit, self.flip = None, False
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        coding = self.headers.get("Accept-Encoding", "")
        self.request_log = Request(self.command, path, self.headers.get("Range", ""), token, coding)
        if path == "/api/agent-harnesses":  # which the client may want to know, once a day
            self.error(404, "")
            return
        self.hub.requests.append(self.request_log)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.hub.fault_for(self.command, path)
        if fault is not None and fault.act(self):
            return
        try:
            self._route(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, path: str) -> None:
        routes = [
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda: self.json({"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/verify", lambda: self.json({})),
            (r"/lfs/([0-9a-f]{64})", self._put),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for pattern, serve in routes:
            if match := re.fullmatch(pattern, path):
                serve(*match.groups())
                return
        self.error(404, "")

    def _repo(self, name: str) -> Repository | None:
        """The repository, if this user may see it; else the answer is out."""
        repo = self.hub.repos.get(name)
        allowed = not self.hub.token or self.request_log.token == self.hub.token
        if repo is None or (repo.private and not allowed):
            self.error(404 if allowed else 401, "RepoNotFound")
            return None
        return repo

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, Content]] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self.error(404, "RevisionNotFound")
            return None
        return commit, repo.commits[commit]

    def _info(self, name: str, revision: str | None) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        commit = repo.resolve(revision or "main")
        if commit is None and revision is not None:
            self.error(404, "RevisionNotFound")
            return
        self.json({"id": name, "sha": commit, "private": repo.private, "siblings": [], "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        found = self._files(name, revision)
        if found is None:
            return
        entries: list[dict[str, Any]] = []
        for path, content in found[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": content.size, "oid": content.blob}
            if content.is_large:
                entry["lfs"] = {"oid": content.sha256, "size": content.size, "pointerSize": 134}
            entries.append(entry)
        page, size = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0]), 20
        more = entries[(page + 1) * size :]
        link = f'<{self.hub.url}/api/models/{name}/tree/{revision}?recursive=true&cursor={page + 1}>; rel="next"'
        self.json(entries[page * size : (page + 1) * size], {"Link": link} if more else {})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._files(name, revision)
        if found is None:
            return
        commit, files = found
        if self.hub.repos[name].gated:
            self.error(403, "GatedRepo")
            return
        if path not in files:
            self.error(404, "EntryNotFound")
            return
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{content.etag}"', "Accept-Ranges": "bytes"}
        if content.is_large:
            headers |= {"X-Linked-Etag": f'"{content.etag}"', "X-Linked-Size": str(content.size)}
        start, stop, code = 0, content.size, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_log.span):
            start, code = int(match[1]), 206
            stop = min(int(match[2]) + 1, stop) if match[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
        self.stream(code, headers, content, start, stop)

    def stream(self, code: int, headers: dict[str, str], content: Content, start: int, stop: int) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(stop - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = stop if self.limit is None else min(stop, start + self.limit)
        for position in range(start, end, CHUNK):
            stop_here = min(position + CHUNK, end)
            if isinstance(content.data, Path) and not self.flip:
                with open(content.data, "rb") as file:
                    self.connection.sendfile(file, position, stop_here - position)
            else:
                piece = content.read(position, stop_here)
                self.wfile.write(bytes([piece[0] ^ self.flip]) + piece[1:] if position == start else piece)
            self.request_log.sent += stop_here - position
            self.hub.pace(stop_here - position)
        if end < stop:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self.answer(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
            return
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[name] = Repository(private=private)
        self.json({"url": f"{self.hub.url}/{name}"})

    def _preupload(self, name: str, revision: str) -> None:
        if self._repo(name) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.json({"files": files})

    def _batch(self, name: str) -> None:
        if self._repo(name) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.uploads:
                put = {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}
                wanted["actions"] = {"upload": put, "verify": {"href": f"{self.hub.url}/lfs/verify", "header": {}}}
            objects.append(wanted)
        self.json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.error(400, "")
            return
        self.hub.uploads[oid] = self.body
        self.answer(200, b"")

    def _commit(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.head(revision))
        summary = ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = Content(base64.b64decode(value["content"]), is_large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.uploads:
                    self.error(400, "")
                    return
                files[value["path"]] = Content(self.hub.uploads[value["oid"]], is_large=True)
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, revision, summary)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    def error(self, code: int, kind: str) -> None:
        self.answer(code, json.dumps({"error": kind}).encode(), {"X-Error-Code": kind} if kind else {})

    def json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(value).encode(), headers)

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.limit])
            self.request_log.sent += len(body[: self.limit])
        if self.limit is not None and self.limit < len(body):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
