"""The bytes of large answers are read from the connection itself, those of others by the client: they are the same bytes."""

import errno
import gzip
import os
import socket
import threading
import time

import pytest

from kconvert.checkpoint.remote import Memory
from kconvert.hub import bodies
from kconvert.hub.ids import HubId

from .conftest import SHARDS
from .faults import cut

SHARD = r"resolve/.*\.safetensors$"
PLACE = HubId("org/model", "main")
BODY = os.urandom(3000)


@pytest.fixture
def answering(hub, monkeypatch):
    """`answering(pieces)`: whoever asks next gets these bytes, each with a packet of its own, and then the end."""
    from huggingface_hub import constants

    monkeypatch.setattr(bodies, "LARGE", 1)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    def serve(pieces):
        asked = b""
        while b"/resolve/" not in asked:  # the client has other questions, too
            line = listener.accept()[0]
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asked = line.recv(1 << 16)
        with line:
            for piece in pieces:
                line.sendall(piece)
                time.sleep(0.02)

    def begin(*pieces):
        threading.Thread(target=serve, args=(pieces,), daemon=True).start()

    with listener:
        yield begin


def received(stop, start=0):
    """What one attempt brings, and how much it says that is."""
    room = bytearray(stop - start)
    count = sum(bodies.receive(PLACE, "a file", start, stop, Memory(room)))
    return bytes(room), count


def head(nbytes, *more, code="206 Partial Content"):
    lines = (f"HTTP/1.1 {code}", f"Content-Length: {nbytes}", f"Content-Range: bytes 0-{nbytes - 1}/{nbytes}", *more)
    return "\r\n".join((*lines, "\r\n")).encode()


@pytest.mark.parametrize("split", [0, 10, 1500])
@pytest.mark.parametrize("with_head", [True, False], ids=["head and body together", "apart"])
def test_a_body_is_the_same_however_it_is_cut_into_packets(answering, split, with_head):
    first = [head(len(BODY)) + BODY[:split]] if with_head else [head(len(BODY)), BODY[:split]]
    answering(*filter(None, first), BODY[split:-1], BODY[-1:])
    assert received(len(BODY)) == (BODY, len(BODY))


def test_nothing_is_read_beyond_the_end_of_an_answer(answering):
    """What follows is the next answer, or rubbish."""
    answering(head(100) + BODY[:50], BODY[50:100] + b"HTTP/1.1 200 OK")
    assert received(100) == (BODY[:100], 100)


def test_an_answer_that_announces_too_little_ends_where_it_says(answering):
    answering(head(100) + BODY[:100])
    assert received(300) == (BODY[:100] + bytes(200), 100)


def test_the_beginning_of_a_file_that_nobody_asked_for_is_left_out(answering):
    answering(head(len(BODY), code="200 OK") + BODY[:700], BODY[700:1800], BODY[1800:])
    assert received(2500, start=1000) == (BODY[1000:2500], 1500)


def test_chunks_and_compressed_bodies_are_read_by_the_client(answering):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    answering(chunked, b"bb8\r\n" + BODY + b"\r\n0\r\n\r\n")
    assert received(len(BODY)) == (BODY, len(BODY))
    packed = gzip.compress(BODY)
    answering(head(len(packed), "Content-Encoding: gzip", code="200 OK"), packed[:40], packed[40:])
    assert received(len(BODY)) == (BODY, len(BODY))


def test_a_connection_that_ends_early_has_brought_what_came(answering):
    answering(head(len(BODY)) + BODY[:10], BODY[10:1000])
    assert received(len(BODY)) == (BODY[:1000] + bytes(2000), 1000)


def test_a_body_that_stops_coming_is_a_fault_that_passes(answering, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    answering(head(len(BODY)) + BODY[:10], *[b""] * 20)
    with pytest.raises(bodies.httpx.TimeoutException):
        received(len(BODY))


@pytest.mark.parametrize("large", [1, 1 << 40], ids=["from the connection", "by the client"])
def test_either_way_a_conversion_gets_the_files_bytes(hub, remote, command, whole, tree, tmp_path, monkeypatch, large):
    monkeypatch.setattr(bodies, "LARGE", large)
    hub.fail(SHARD, cut(70_001), times=4)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert tree(tmp_path / "dst") == whole


@pytest.mark.parametrize("piece", [4096, 3 * 4096])
def test_files_that_arrive_in_many_pieces_are_the_same(hub, remote, command, whole, tree, tmp_path, monkeypatch, piece):
    from kconvert.checkpoint import download

    monkeypatch.setattr(download, "PIECE", piece)
    hub.fail(SHARD, cut(100_001), times=6)
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS, "--disk-budget", "20MB")
    assert tree(tmp_path / "dst") == whole


def test_a_disk_that_is_full_is_said_to_be(hub, remote, command, tmp_path, monkeypatch):
    from kconvert.checkpoint import download

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "write_past_cache", full)
    message = command.refused("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    assert "cannot write" in message
    assert "No space left on device" in message


def test_a_client_on_another_line_than_a_socket_is_read_all_the_same(hub, remote, command, monkeypatch):
    """One that somebody has set, with a transport of its own."""
    monkeypatch.setattr(bodies, "LARGE", 1)
    monkeypatch.setattr(bodies, "_line", lambda response, nbytes: None)
    command.ok("inspect", remote)


def test_small_files_are_asked_for_compressed_and_ranges_are_not(hub, remote, command, tmp_path):
    command.ok("int4-to-bf16", remote, tmp_path / "dst", *SHARDS)
    got = [request for request in hub.requests if request.method == "GET"]
    assert all("gzip" in request.coding for request in got if "/resolve/" not in request.path)
    assert all("gzip" in request.coding for request in got if request.path.endswith(("config.json", "LICENSE")))
    assert {request.coding for request in got if request.path.endswith(".safetensors")} == {"identity"}


def test_files_that_come_compressed_are_what_they_were(hub, remote, command, monkeypatch):
    from .server import Handler

    plain = Handler.stream

    def packed(handler, code, headers, content, start, stop):
        if handler.command == "GET" and "gzip" in handler.request_log.coding:
            handler.answer(code, gzip.compress(content.read(start, stop)), headers | {"Content-Encoding": "gzip"})
        else:
            plain(handler, code, headers, content, start, stop)

    monkeypatch.setattr(Handler, "stream", packed)
    sent = hub.sent
    command.ok("inspect", remote)
    size = hub.repos[remote].head()["config.json"].size
    assert 0 < sent(r"config\.json$") < size
