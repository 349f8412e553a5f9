"""Servers that are not there, want a key, have another model or hang; and addresses."""

import socket
import time

import pytest
from chat_server import Script, serving

import kconvert
from kconvert import CheckFailed, KconvertError
from kconvert.chat import server
from kconvert.chat.server import address

pytest.importorskip("aiohttp")


@pytest.mark.parametrize("script", [Script(delay=3), Script(comments=3)], ids=["silent", "keeps the connection alive"])
def test_a_server_that_hangs_is_waited_for_once(smoke, script):
    began = time.monotonic()
    report = smoke(script, timeout=0.4)
    assert time.monotonic() - began < 2.5
    assert "gave no whole answer within 0.4 s" in report.failed[0].said
    assert "calls-in-a-row" in report.not_run


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        (Script(key="secret"), {}, "wants a key (401): give its own with --api-key or in OPENAI_API_KEY"),
        (Script(key="secret"), {"api_key": "other"}, "does not take the key that it was given (401)"),
        (Script(models=("a", "b")), {}, "serves 'a', 'b': choose one with --model"),
        (Script(models=("a",)), {"model": "c"}, "serves no model 'c' but 'a'"),
        (Script(models=()), {}, "lists no model"),
        (Script(listing=b"<html>", content_type="text/html"), {}, "but with no list of models"),
        (Script(listing=b'{"data": 3}'), {}, "3}', but with no list of models; what does its log say?"),
        (Script(listing=b" "), {}, "/v1/models answers nothing, but with no list of models"),
        (Script(listing=b'{"error": "Loading"}', listing_status=503), {}, "/models: the server answers 503: 'Loading'"),
        (Script(), {"concurrency": 1001}, "concurrency between 1 and 1000"),
        (Script(), {"timeout": 0}, "timeout is positive, max_tokens at least 1"),
    ],
)
def test_no_such_server_or_model_is_an_error_and_no_failed_check(smoke, script, options, words):
    with pytest.raises(KconvertError) as found:
        smoke(script, **options)
    assert words in str(found.value)
    assert not isinstance(found.value, CheckFailed)
    assert "other" not in str(found.value)


def test_a_key_that_fits_opens(smoke):
    assert smoke(Script(key="secret"), api_key="secret", tools=False).passed


@pytest.mark.parametrize(
    ("path", "words"),
    [("http://127.0.0.1:{port}/v2", "has no /v2/models (404)"), ("http://127.0.0.1:1", "nothing listens there")],
)
def test_an_address_without_a_server_is_one_sentence_and_exit_2(run_command, path, words):
    with serving(Script()) as url:
        result = run_command(path.format(port=url.split(":")[2].split("/")[0]))
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://host:1/", "http://host:1/v1"),
        ("https://host/api/v1/", "https://host/api/v1"),
        ("http://host:1/v1/chat/completions", "http://host:1/v1"),
        ("http://[::1]:30000", "http://[::1]:30000/v1"),
    ],
)
def test_an_address_may_be_typed_short(typed, meant):
    assert address(typed) == meant


@pytest.mark.parametrize(
    "typed", ["", "http://", "ftp://host", "http://host:99999", "a b", "http://h/?x=1", "http://[::1"]
)
def test_what_is_no_address_is_refused(typed):
    with pytest.raises(KconvertError, match="is no address of a server"):
        address(typed)


def test_a_longer_timeout_is_not_advised_where_it_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(server, "LISTING", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(KconvertError) as found:
        kconvert.smoke(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=60)
    assert str(found.value).endswith("gave no whole answer within 0.3 s; is the server overloaded, or still loading?")
