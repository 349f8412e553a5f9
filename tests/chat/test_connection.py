"""`smoke` against what is no server of OpenAI's protocol, or one that breaks off: what it says is true, and it never hangs."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import pytest
from chat_server import Reply, Script, healthy, serving

import kconvert
from kconvert import KconvertError

pytest.importorskip("aiohttp")
GOOD = b'{"choices": [{"message": {"content": "9.9", "reasoning": "Hm."}, "finish_reason": "stop"}]}'
LISTED = b'{"data": [{"id": "kimi"}]}'


def http(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


@contextmanager
def sending(answer: bytes, seen: list[bytes] | None = None, streamed: bytes | None = None) -> Iterator[str]:
    """The address of a server that lists a model and answers every chat with these bytes, those `streamed` if it is to stream;
    `seen` gets what it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply(connection: socket.socket) -> None:
            asked = connection.recv(1 << 20)
            if seen is not None:
                seen.append(asked)
            streams = b'"stream":true' in asked.replace(b" ", b"") and streamed is not None
            connection.sendall(http(LISTED) if asked.startswith(b"GET") else streamed if streams else answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

        def serve() -> None:
            with suppress(OSError):  # when it is closed
                while True:
                    connection, _ = listening.accept()
                    with connection, suppress(OSError):  # of a client that has heard enough
                        reply(connection)

        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def chat_of(url: str, **options: Any) -> str:
    """What the check `chat` says."""
    return said_of(url, **options)["chat"]


def said_of(url: str, **options: Any) -> dict[str, str]:
    """What each check says."""
    report = kconvert.smoke(url, tools=False, long_words=0, timeout=20, **options)
    return {check.name: check.said for check in report.checks}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed the connection without a whole answer, or does not speak HTTP"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "closed the connection without a whole answer, or does not speak HTTP"),
        (http(b'{"choices"', b"Content-Length: 99"), "closed the connection without a whole answer"),
        (http(b"plain", b"Content-Encoding: gzip"), "a body that is not compressed as its Content-Encoding says"),
    ],
)
def test_half_an_answer_and_what_is_no_http_are_told_for_what_they_may_be(answer: bytes, words: str) -> None:
    with sending(answer) as url:
        assert chat_of(url).startswith(f"{url} ")
        assert words in chat_of(url)


def test_a_server_that_sends_on_to_one_that_is_not_there_is_not_said_to_be_gone() -> None:
    with sending(http(b"", b"Location: http://127.0.0.1:1/v1/chat", status=b"307 Moved")) as url:
        assert chat_of(url).startswith(f"http://127.0.0.1:1, which {url} sends on to: nothing listens there")


def test_a_server_that_sends_on_to_itself_for_ever_is_one_sentence() -> None:
    with sending(http(b"", b"Location: /v1/chat/completions", status=b"307 Moved")) as url:
        assert chat_of(url) == f"{url} sends on without end; give the address of the server itself"


@pytest.mark.parametrize("finish", ["abort", "error", "content_filter"])
def test_an_answer_that_the_server_broke_off_is_no_whole_one(finish: str) -> None:
    with serving(Script(reply=lambda request: {**healthy(request), "finish_reason": finish})) as url:
        assert chat_of(url).startswith(f"finish_reason is '{finish}' and not 'stop', after '9.9 is bigger than 9.11.'")


@pytest.mark.parametrize("key", ["abc\r", "a b", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_printed(key: str) -> None:
    with pytest.raises(
        KconvertError, match="the key that was given with --api-key or in OPENAI_API_KEY is none"
    ) as found:
        kconvert.smoke("http://127.0.0.1:1", api_key=key)
    assert key not in str(found.value)


def test_a_password_in_the_address_is_used_and_not_printed() -> None:
    seen: list[bytes] = []
    with sending(http(GOOD), seen) as url:
        assert "p%40ss" not in chat_of(url.replace("//", "//me:p%40ss@"))
    assert b"authorization: basic bwu6cebzcw==" in seen[0].lower()  # me:p@ss
    with pytest.raises(KconvertError, match=r"^http://127\.0\.0\.1:1/v1: nothing listens there"):
        kconvert.smoke("http://me:secret@127.0.0.1:1")


def test_no_number_of_seconds_is_refused() -> None:
    with pytest.raises(KconvertError, match="timeout is positive"):
        kconvert.smoke("http://127.0.0.1:1", timeout=float("nan"))


def test_words_that_no_unicode_has_can_be_handed_back() -> None:
    def reply(request: Any) -> Reply:
        made = healthy(request)
        return (
            {**made, "reasoning_content": "half of a pair: \ud800"}
            if request["messages"][-1]["role"] == "user"
            else made
        )

    assert json.dumps("\ud800") == '"\\ud800"'  # so the scripted server sends it
    with serving(Script(reply=reply)) as url:
        assert kconvert.smoke(url, timeout=20, long_words=0).passed


DELTA = {"choices": [{"index": 0, "delta": {"content": "9.9"}, "finish_reason": "stop"}]}


def test_a_connection_that_breaks_behind_the_finish_reason_is_not_said_to_lack_one() -> None:
    event = f"data: {json.dumps(DELTA)}\n\n".encode()
    with sending(http(GOOD), streamed=http(event, b"Content-Length: 999")) as url:
        said = said_of(url)["stream"]
    assert said.startswith(
        "the stream ended after '9.9' behind its finish_reason, and not as HTTP ends it: it was cut short"
    )


@pytest.mark.parametrize("chunk", ["null", "[1]", "3", '"9.9"'])
def test_a_chunk_that_is_json_but_no_object_is_named(chunk: str) -> None:
    with serving(Script(raw_chunk=chunk)) as url:
        assert said_of(url)["stream"] == "the stream has a chunk that is no JSON object"


VALIDATION = b'{"detail": [{"loc": ["body", "max_tokens"], "msg": "not permitted"}]}'


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (422, VALIDATION, """answers 422: '[{"loc": ["body", "max_tokens"], "msg": "not permitted"}]'"""),
        (500, b'[{"cause": "x"}]', """answers 500: '[{"cause": "x"}]'"""),
        (200, b'{"error": [7]}', "answers 200, but with an error: '[7]'"),
        (
            200,
            b'{"object": "error", "message": "no"}',
            """the server's answer '{"object": "error", "message": "no"}' is no chat completion""",
        ),
        (200, b"<html>Log in\n</html>", "answer '<html>Log in </html>' is no chat completion"),
        (200, b"", "the server's answer is no chat completion: it has no choice with a finish_reason"),
    ],
)
def test_what_a_server_says_in_a_shape_of_its_own_is_shown(status: int, body: bytes, words: str) -> None:
    with sending(http(body, status=b"%d Whatever" % status)) as url:
        assert words in chat_of(url)


@pytest.mark.parametrize(
    "body", [b"x" * (1 << 20), gzip.compress(b"x" * (1 << 20)), f"data: {json.dumps(DELTA)}\n\n".encode() * 9000]
)
def test_an_answer_without_end_is_not_read_to_it(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kconvert.chat.server.MOST_BYTES", 1 << 19)
    packed = [b"Content-Encoding: gzip"] if body.startswith(b"\x1f\x8b") else []
    with sending(http(body, *packed)) as url:
        found = said_of(url)
    assert found["chat"].startswith("the server sends on after 0 MiB of an answer")
    assert found["stream"] == found["chat"]


def test_a_host_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)
    with pytest.raises(KconvertError, match=r"^http://no\.such\.host\.invalid/v1: no host of that name is known here"):
        kconvert.smoke("no.such.host.invalid")


def test_a_server_without_tls_is_not_said_to_be_gone() -> None:
    with sending(b"") as url, pytest.raises(KconvertError, match="the server speaks no TLS that is trusted here"):
        kconvert.smoke(url.replace("http:", "https:"), timeout=5)


def test_a_proxy_is_used_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)
    seen: list[bytes] = []
    with sending(http(GOOD), seen) as url:
        monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/v1"))
        assert chat_of("http://model.invalid/v1").startswith("answered '9.9'")
    assert seen[0].startswith(b"GET http://model.invalid/v1/models")


def test_a_proxy_that_is_not_there_is_not_taken_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with pytest.raises(KconvertError, match=r"^http://model\.invalid/v1 is asked by way of a proxy"):
        kconvert.smoke("http://model.invalid/v1")


def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
