"""What a network does to a run: it is waited out, or it ends the run with one sentence, and the next run goes on."""

import os
import re
import socket
import time
from email.utils import formatdate

import pytest
from huggingface_hub import constants

from kconvert.checkpoint import remote as probing

from .conftest import SHARDS
from .faults import corrupt, cut, hang, reset, status

SHARD = r"resolve/.*\.safetensors$"
PASSING = {
    "a reset": reset,
    "a truncated body": cut(10),
    "an empty body": cut(0),
    "429 with Retry-After": status(429, Retry_After="0"),
    "500": status(500),
    "502": status(502),
    "503": status(503),
}


def passing():
    return pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)


@passing()
@pytest.mark.parametrize("call", ["/api/models/[^/]+/[^/]+$", "/tree/", r"config\.json$", SHARD])
def test_what_passes_is_waited_out(hub, remote, command, fault, call):
    hub.fail(call, fault, times=2)
    command.ok("inspect", remote)
    assert hub.faults[0].times == 0


@passing()
def test_a_conversion_survives_faults_in_every_file(hub, remote, command, whole, tree, tmp_path, fault):
    command.ok("inspect", remote)
    hub.fail(SHARD, fault, times=5)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole


def test_the_clients_own_errors_are_known_whichever_http_library_it_has():
    from huggingface_hub.errors import HfHubHTTPError

    from kconvert.hub import client

    assert issubclass(HfHubHTTPError, client.httpx.HTTPError)


def test_an_answer_that_does_not_come_is_asked_for_again(hub, remote, command, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.fail(SHARD, hang(0.6))
    command.ok("inspect", remote)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (reset, "the connection failed"),
        (cut(0), "the connection failed"),
        (status(429, Retry_After="0"), "fewer requests"),
        (status(429, Retry_After="86400"), "fewer requests"),
        (status(503), "the Hub answered 503"),
        (status(403), "access was refused (403)"),
        (status(401), "access was refused (401)"),
        (status(418), "the Hub answered 418"),
        (status(404, X_Error_Code="EntryNotFound"), "there is no such file"),
        (status(404, X_Error_Code="RevisionNotFound"), "there is no revision"),
        (status(403, X_Error_Code="GatedRepo"), "the repository is gated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_pass_is_one_sentence_and_a_rerun_goes_on(
    hub, remote, command, whole, tree, tmp_path, fault, words
):
    arguments = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    last = max(name for name in hub.repos[remote].head() if name.endswith(".safetensors"))
    hub.fail(rf"{last}$", lambda handler: False)  # the header
    hub.fail(rf"{last}$", fault, times=1000)
    message = command.refused(*arguments)
    assert words in message
    assert last in message
    assert remote in message
    assert not (tmp_path / "dst" / "config.json").exists()
    hub.faults.clear()
    command.ok(*arguments)
    assert tree(tmp_path / "dst") == whole


def test_the_waits_grow_and_are_bounded(hub, remote, command, monkeypatch):
    from kconvert.hub import client

    monkeypatch.setattr(client, "BACKOFF", (0.01, 0.02))
    hub.fail("/api/", status(500), times=1000)
    command.refused("inspect", remote)
    assert hub.count("/api/") == 3


@pytest.mark.parametrize("spelled", ["seconds", "date", "rate limit"])
def test_a_server_says_how_long_to_wait(hub, remote, command, spelled):
    headers = {
        "seconds": {"Retry_After": "1"},
        "date": {"Retry_After": formatdate(time.time() + 2.5, usegmt=True)},  # cut to whole seconds
        "rate limit": {"RateLimit": '"api";r=0;t=1'},
    }
    hub.fail("/api/", status(429, **headers[spelled]))
    started = time.monotonic()
    command.ok("inspect", remote)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("value", ["soon", "-5", "\xb2", "9" * 400])
def test_a_senseless_retry_after_ends_in_a_wait_or_in_one_sentence(hub, remote, command, value):
    hub.fail("/api/", status(429, Retry_After=value))
    result = command("inspect", remote)
    assert result.exit_code == 0 or "fewer requests (429)" in result.stderr


def test_a_password_in_the_endpoint_is_not_shown(hub, remote, command, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", "//me:geheim@"))
    hub.fail("/api/", status(418), times=9)
    message = command.refused("inspect", remote)
    assert hub.url in message
    assert "geheim" not in message


def test_a_range_that_is_not_the_one_asked_for_is_asked_for_again(hub, remote, command):
    def shift(handler):
        handler.request_log.span = handler.request_log.span.replace("bytes=0-", "bytes=8-")
        return False

    hub.fail(SHARD, shift, times=2)
    command.ok("inspect", remote)


@pytest.mark.parametrize("options", [(), ("--disk-budget", "20MB")], ids=["cached", "within a budget"])
def test_wrong_content_is_fetched_again(hub, remote, command, whole, tree, tmp_path, options):
    command.ok("inspect", remote)
    first = min(name for name in hub.repos[remote].head() if name.endswith(".safetensors"))
    hub.fail(rf"{first}$", lambda handler: False)
    hub.fail(rf"{first}$", corrupt, times=2)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, *options)
    assert tree(tmp_path / "dst") == whole


def test_content_that_stays_wrong_is_one_sentence(hub, remote, command, whole, tree, tmp_path):
    arguments = ("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    first = min(name for name in hub.repos[remote].head() if name.endswith(".safetensors"))
    hub.fail(rf"{first}$", lambda handler: False)
    hub.fail(rf"{first}$", corrupt, times=1000)
    message = command.refused(*arguments)
    assert first in message
    assert "another content than the list of files describes" in message
    hub.faults.clear()
    command.ok(*arguments)
    assert tree(tmp_path / "dst") == whole


def test_a_wrong_config_is_fetched_again(hub, remote, command):
    hub.fail(r"/config\.json$", corrupt)
    assert command.ok("inspect", remote).startswith(remote)


def test_a_wrong_side_file_is_fetched_again(hub, remote, command, whole, tree, tmp_path):
    hub.fail(r"/LICENSE$", corrupt)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole


def test_a_server_that_ignores_ranges_is_read_all_the_same(hub, remote, command, whole, tree, tmp_path, monkeypatch):
    from .server import Handler

    real = Handler._resolve

    def plain(handler, *arguments):
        handler.request_log.span = ""
        real(handler, *arguments)

    monkeypatch.setattr(Handler, "_resolve", plain)
    hub.fail(SHARD, cut(300_000), times=3)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole


def test_a_server_that_always_begins_anew_and_never_comes_further_is_given_up(hub, remote, command, monkeypatch):
    from .server import Handler

    real = Handler._resolve

    def plain(handler, *arguments):
        handler.request_log.span = ""
        real(handler, *arguments)

    monkeypatch.setattr(Handler, "_resolve", plain)
    hub.fail(SHARD, cut(10), times=1000)
    assert "the connection failed" in command.refused("inspect", remote)
    assert hub.count(SHARD) < 200


def test_a_server_that_is_not_there_is_one_sentence(hub, remote, command, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:geheim@127.0.0.1:9/hub")
    line = command.refused("inspect", remote)
    assert "HF_ENDPOINT is http://127.0.0.1:9/hub, where nobody takes connections (Connection refused)" in line
    assert "geheim" not in line


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://no-such-host.invalid", "no host 'no-such-host.invalid' is known; set it right, or leave it out"),
        ("huggingface.co", "which is no address; one is like https://host"),
        ("http://[1", "which is no address"),
        ("http://127.0.0.1:port", "which is no address"),
        ("http://hugging..face", "no host 'hugging..face' is known"),
    ],
)
def test_an_address_of_the_hub_that_is_mistyped_is_not_waited_for(hub, remote, command, monkeypatch, endpoint, words):
    from kconvert.hub import client

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(client, "BACKOFF", (1e6,))
    assert words in command.refused("inspect", remote)


@pytest.mark.parametrize("endpoint", ["http://[::1", "https://host:443443"])
@pytest.mark.parametrize("arguments", [("inspect", "{remote}"), ("sample", "{directory}", "--push", "me/sample")])
def test_no_client_is_needed_to_see_that_an_address_is_none(
    command, monkeypatch, tmp_path, remote, endpoint, arguments
):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)  # with which huggingface_hub cannot be imported
    words = [word.format(remote=remote, directory=tmp_path / "sample") for word in arguments]
    assert f"HF_ENDPOINT is {endpoint!r}, which is no address" in command.refused(*words)


def test_a_host_that_never_answers_is_not_waited_for_long(hub, remote, command, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://mirror:8")
    monkeypatch.setattr(probing, "ANSWERS_IN", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    assert "where nobody answered within" in command.refused("inspect", remote)


@pytest.fixture
def full():
    """The port of a server that has taken all the connections it ever will: others wait."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.create_connection(server.getsockname()):
        yield server.getsockname()[1]


def test_a_host_of_which_one_address_leads_nowhere_is_reached_by_the_other(hub, remote, command, monkeypatch, full):
    known, port = socket.getaddrinfo, int(hub.url.rpartition(":")[2])
    both = [*known("127.0.0.1", full, type=socket.SOCK_STREAM), *known("127.0.0.1", port, type=socket.SOCK_STREAM)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    monkeypatch.setattr(probing, "ANSWERS_IN", 0.5)
    probing.check_endpoint("http://mirror", "HF_ENDPOINT")


@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY"])
def test_a_host_that_only_a_proxy_knows_is_left_to_it(monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    probing.check_endpoint(f"http://known-to-{variable}.invalid", "HF_ENDPOINT")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such", "there is no such repository, or it is private"),
        ("moonshotai/Tiny-K2@v9", "there is no revision 'v9'"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(hub, remote, command, name, words):
    assert words in command.refused("inspect", name)
    assert hub.count("/api/") == 1


def test_a_directory_that_is_not_there_is_said_to_be_none(hub, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    nowhere = f"my/out on {hub.url} (no directory here is called so): cannot find the commit"
    assert nowhere in command.refused("launch", "my/out", "--engine", "vllm")
    (tmp_path / "my/out").mkdir(parents=True)
    assert nowhere.replace(" (no directory here is called so)", "") in command.refused("inspect", "hf://my/out")


def test_offline_mode_is_one_sentence(hub, remote, command, monkeypatch):
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert "HF_HUB_OFFLINE is set" in command.refused("inspect", remote)
    assert hub.requests == []


TOKEN = "hf_" + "Secret" * 6


@pytest.fixture
def private(hub, remote, monkeypatch):
    hub.token, hub.repos[remote].private = TOKEN, True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return remote


def test_a_private_repository_is_read_with_the_users_token(private, command, whole, tree, tmp_path):
    command.ok("int4-to-bf16", private, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole


def test_without_a_token_a_private_repository_is_not_there(private, command, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "or it is private; check the name, or log in" in command.refused("inspect", private)


def test_the_token_appears_nowhere(hub, private, kconvert, command, tmp_path):
    """Not in what is printed on success or failure, not in any file, not in what is published."""
    said = [
        kconvert("int4-to-bf16", private, tmp_path / "dst", *SHARDS, "-v", "--push", "me/out"),
        kconvert("int4-to-bf16", private, tmp_path / "json", *SHARDS, "--json", "--disk-budget", "20MB"),
    ]
    assert [result.returncode for result in said] == [0, 0], said
    for fault in (status(403), status(503)):
        hub.faults.clear()
        hub.fail(SHARD, fault, times=1000)
        said.append(command("int4-to-bf16", private, tmp_path / "bad", *SHARDS))
    assert not [result for result in said if TOKEN in result.stdout + result.stderr]
    assert {request.token for request in hub.requests if not request.path.startswith("/lfs/")} == {TOKEN}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    published = hub.repos["me/out"].head()
    assert not [name for name, content in published.items() if TOKEN.encode() in content.read(0, content.size)]


def test_nothing_is_printed_of_a_fault_that_passed(hub, remote, kconvert, tmp_path):
    hub.fail(SHARD, status(503), times=1)
    result = kconvert("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"wrote .*\nengines: .*\n", result.stdout)
    assert os.listdir(tmp_path / "dst")
