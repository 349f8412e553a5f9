"""A scripted server on 127.0.0.1 that speaks OpenAI's protocol, with every fault that a real one may have."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from kconvert import SmokeReport

Reply = dict[str, Any]  # of a message, and its `finish_reason`
HEALTHY_REASONING = "0.9 is more than 0.11."


def call(
    arguments: object = '{"city": "Beijing"}', name: str = "get_weather", id: str = "functions.get_weather:0"
) -> Reply:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def healthy(request: Mapping[str, Any], key: str = "reasoning_content") -> Reply:
    """What Kimi-K2-Thinking answers behind the right parsers."""
    last = request["messages"][-1]
    if last["role"] == "tool":
        return {"content": f"It is {json.loads(last['content'])['weather']} there."}
    if "tools" in request:
        city = re.findall(r"weather in (\w+)", last["content"])[-1]
        made = call(json.dumps({"city": city}))
        return {"content": None, key: "I look it up.", "tool_calls": [made], "finish_reason": "tool_calls"}
    return {"content": "9.9 is bigger than 9.11.", key: HEALTHY_REASONING}


@dataclass
class Script:
    """`reply` makes the message of a chat; the rest are faults: of the connection, of the listing, of the stream."""

    reply: Callable[[Mapping[str, Any]], Reply] = healthy
    models: tuple[str, ...] = ("kimi",)
    key: str | None = None
    status: int = 200
    body: bytes | None = None  # instead of any answer to a chat
    listing: bytes | None = None
    listing_status: int = 200
    content_type: str = "application/json"
    cut_after: int | None = None  # chunks of a stream
    clean_cut: bool = False  # and the stream ends as if it were whole
    raw_chunk: str | None = None  # behind the first one
    usage: bool = True
    delay: float = 0.0  # before a chat is answered
    comments: float = 0.0  # seconds of a stream that keeps itself alive and says nothing
    requests: list[Mapping[str, Any]] = field(default_factory=list)


def deltas(reply: Reply) -> Iterator[Reply]:
    """A message in pieces of four characters, arguments too."""
    for key in ("reasoning_content", "reasoning", "content"):
        words = reply.get(key) or ""
        yield from ({key: words[at : at + 4]} for at in range(0, len(words), 4))
    for index, made in enumerate(reply.get("tool_calls") or ()):
        arguments = made["function"]["arguments"]
        yield {"tool_calls": [{**made, "index": index, "function": {**made["function"], "arguments": ""}}]}
        for at in range(0, len(arguments), 4):
            yield {"tool_calls": [{"index": index, "function": {"arguments": arguments[at : at + 4]}}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    script: Script

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._send(404, b'{"detail": "Not Found"}')
        elif self.script.key is not None and self.headers["Authorization"] != f"Bearer {self.script.key}":
            self._send(401, b'{"error": "Unauthorized"}')
        else:
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.script.models]}
            self._send(
                self.script.listing_status, self.script.listing or json.dumps(listed).encode(), self.script.content_type
            )

    def do_POST(self) -> None:
        script = self.script
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script.requests.append(request)
        time.sleep(script.delay)
        if script.body is not None or script.status != 200:
            self._send(script.status, script.body or b"{}")
            return
        reply = script.reply(request)
        finish = reply.pop("finish_reason", "stop")
        if request.get("stream"):
            self._stream(reply, finish)
        else:
            usage = {"prompt_tokens": 30, "completion_tokens": 12} if script.usage else None
            message = {"role": "assistant", **reply}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            self._send(200, json.dumps({"id": "1", "choices": [choice], "usage": usage}).encode())

    def _stream(self, reply: Reply, finish: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        until = time.monotonic() + self.script.comments
        while time.monotonic() < until:
            self._chunk(b": still there\n\n")
            time.sleep(0.05)
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas(reply)]
        for number, chunk in enumerate(chunks):
            if number == self.script.cut_after:
                self.close_connection = True
                if self.script.clean_cut:
                    self.wfile.write(b"0\r\n\r\n")
                return
            if number == 1 and self.script.raw_chunk is not None:
                self._chunk(f"data: {self.script.raw_chunk}\n\n".encode())
            self._event(chunk)
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        if self.script.usage:
            self._event({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 12}})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, document: object) -> None:
        self._chunk(f"data: {json.dumps(document)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away is what some tests are about


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The address of a server that follows `script`."""
    server = Quiet(("127.0.0.1", 0), type("Scripted", (Handler,), {"script": script}))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(reply: Reply) -> Script:
    """A script that answers every chat the same."""
    return Script(reply=lambda request: dict(reply))


def calls(reply: Reply, then: Reply | None = None) -> Script:
    """A healthy script, but for its calls of tools, and for its answer to their results."""

    def answer(request: Mapping[str, Any]) -> Reply:
        last = request["messages"][-1]["role"]
        if last == "tool" and then is not None:
            return dict(then)
        return dict(reply) if last == "user" and "tools" in request else healthy(request)

    return Script(reply=answer)


def verdicts(report: SmokeReport) -> dict[str, str]:
    """What the checks that failed say, by their names."""
    return {check.name: check.said for check in report.failed}
