"""The same against servers of other makes, where they are installed: s3rver and Azurite, from npm, and fake-gcs-server, which
can be read by obstore and not written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kconvert.stores import writing
from kconvert.stores.urls import parse_store_url
from kconvert.stores.writing import Objects

from .conftest import SHARDS, Tree
from .test_writing import LAST, ok, refused

ACCOUNT = "devstoreaccount1"  # Azurite's own, whose key is public
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(params=["s3rver", "azurite-blob"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place in an empty bucket."""
    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    port, data = free_port(), tmp_path / "server"
    data.mkdir()
    url = f"http://127.0.0.1:{port}"
    if request.param == "s3rver":
        command = [
            program,
            "-d",
            data,
            "-a",
            "127.0.0.1",
            "-p",
            port,
            "--configure-bucket",
            "models",
            "--no-vhost-buckets",
        ]
        keys = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_REGION": "us-east-1"}
        variables = {"AWS_ENDPOINT_URL": url, **keys}
    else:
        command = [
            program,
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            port,
            "-l",
            data,
            "--skipApiVersionCheck",
            "--silent",
        ]
        keys = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY}
        variables = {"AZURE_STORAGE_ENDPOINT": f"{url}/{ACCOUNT}", **keys}
    for name, value in {**variables, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(writing, "PART", 5 << 20)
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port, server)
            if request.param != "s3rver":
                make_container(url)
            yield f"{'s3' if request.param == 's3rver' else 'az'}://models/out"
        finally:
            server.kill()


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not start")


def make_container(url: str) -> None:
    """obstore makes none."""
    import base64
    import hashlib
    import hmac
    from email.utils import formatdate

    date = formatdate(usegmt=True)
    blank = "\n" * 12  # headers that are not sent
    said = f"PUT{blank}x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/models\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), said.encode(), hashlib.sha256).digest()).decode()
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {ACCOUNT}:{signature}",
        "Content-Length": "0",
    }
    request = urllib.request.Request(f"{url}/{ACCOUNT}/models?restype=container", headers=headers, method="PUT")
    urllib.request.urlopen(request, timeout=10).read()


def files(place: str) -> dict[str, bytes]:
    url = parse_store_url(place)
    assert url is not None
    objects = Objects(url)
    return {name: objects.read(name) or b"" for name in objects.listed() if not name.startswith(".kconvert/")}


@pytest.fixture
def local(int4: Path, tmp_path: Path, tree: Tree) -> dict[str, bytes]:
    ok("int4-to-bf16", int4, tmp_path / "local", *SHARDS)
    return tree(tmp_path / "local")


def test_a_run_and_a_rerun(place: str, int4: Path, local: dict[str, bytes]) -> None:
    ok("int4-to-bf16", int4, place, *SHARDS)
    assert files(place) == local
    assert "was finished already" in ok("int4-to-bf16", int4, place, *SHARDS)
    assert "holds a conversion with other settings" in refused("int4-to-bf16", int4, place, "--shard-size", "1MB")
    ok("verify", int4, place, "-q")
    ok("int4-to-bf16", int4, place, *SHARDS, "--overwrite")
    assert files(place) == local


def test_large_shards_go_in_parts(place: str, tmp_path: Path, tree: Tree) -> None:
    sizes = ("--layers", 2, "--experts", 8, "--hidden", 512, "--vocab", 16384)
    ok("sample", tmp_path / "sample", *sizes)
    ok("sample", place, *sizes)
    whole = tree(tmp_path / "sample")
    assert max(map(len, whole.values())) > 2 * writing.PART
    assert files(place) == whole


def test_ranks_and_what_closes_them(place: str, int4: Path, local: dict[str, bytes]) -> None:
    for index in (1, 0):
        ok("int4-to-bf16", int4, place, *SHARDS, "--worker", f"{index}/2")
    assert not files(place).keys() & set(LAST)
    ok("finalize", place)
    assert files(place) == local
    assert "was closed already" in ok("finalize", place)


def test_what_is_there_is_not_made_again(place: str) -> None:
    url = parse_store_url(place)
    assert url is not None
    objects = Objects(url)
    assert objects.create("plan.json", b"first")
    if objects.create("plan.json", b"second"):
        pytest.xfail("this server takes no notice of If-None-Match")
    assert objects.read("plan.json") == b"first"


def test_what_is_in_google_s_storage_is_read(
    int4: Path, local: dict[str, bytes], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which("fake-gcs-server")
    if program is None:
        pytest.skip("fake-gcs-server is not installed")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    key = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    command = [
        program,
        "-scheme",
        "http",
        "-host",
        "127.0.0.1",
        "-port",
        str(port),
        "-public-host",
        f"127.0.0.1:{port}",
    ]
    command += ["-backend", "memory"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port, server)
            post(f"{url}/storage/v1/b?project=tests", b'{"name": "models"}', "application/json")
            for path in (path for path in int4.rglob("*") if path.is_file() and ".kconvert" not in path.parts):
                name = f"{url}/upload/storage/v1/b/models/o?uploadType=media&name=tiny/{path.relative_to(int4)}"
                post(name, path.read_bytes(), "application/octet-stream")
            ok("int4-to-bf16", "gs://models/tiny", tmp_path / "out", *SHARDS, "--disk-budget", "12MB")
        finally:
            server.kill()
    assert tree(tmp_path / "out") == local


def post(url: str, content: bytes, kind: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, content, {"Content-Type": kind}), timeout=10).read()
