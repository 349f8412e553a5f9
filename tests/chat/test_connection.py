"""`smoke` against what is no server of OpenAI's protocol, or one that breaks off: what it says is true, and it never hangs."""

from __future__ import annotations

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

pytest.importorskip("openai")
LISTED = b'{"data": [{"id": "kimi"}]}'


def http(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


@contextmanager
def sending(answer: bytes) -> Iterator[str]:
    """The address of a server that lists a model and answers every chat with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):  # when it is closed
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        asked = connection.recv(1 << 20)
                        connection.sendall(http(LISTED) if asked.startswith(b"GET") else answer)
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(1 << 20):
                            pass

        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def chat_of(url: str, **options: Any) -> str:
    """What the check `chat` says."""
    report = kconvert.smoke(url, tools=False, long_words=0, timeout=20, **options)
    return report.checks[1].said


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
