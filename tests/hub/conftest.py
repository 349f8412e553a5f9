"""The real huggingface_hub client against a small Hub on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from kconvert.cli import main

from .server import Hub

REPO = "moonshotai/Tiny-K2"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub for one test; the client of this process, and of those that it starts, knows no other."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    from kconvert.hub import bodies, client

    home = tmp_path / "hf"
    with Hub() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 2,
            "HF_HUB_ETAG_TIMEOUT": 2,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(client, "BACKOFF", (0.01, 0.01, 0.02, 0.02, 0.02))
        monkeypatch.setattr(bodies, "LARGE", 100_000)  # shards are, headers are not
        for module in (_http, file_download):  # the client's own waits
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield hub


@pytest.fixture
def remote(hub: Hub, int4: Path) -> str:
    """The id of a repository that holds the checkpoint `int4`."""
    hub.add(REPO, int4)
    return REPO


@dataclass
class Command:
    """`kconvert …` in this process; what it does not catch ends the test."""

    def __call__(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)

    def ok(self, *arguments: object) -> str:
        result = self(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def refused(self, *arguments: object) -> str:
        """The one sentence of a command that ends with exit code 2."""
        result = self(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """The same as a process of its own."""
        return subprocess.Popen(
            [Path(sys.executable).with_name("kconvert"), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )


@pytest.fixture
def command() -> Command:
    return Command()


@pytest.fixture(scope="session")
def whole(
    int4: Path, tmp_path_factory: pytest.TempPathFactory, tree: Callable[[Path], dict[str, bytes]]
) -> dict[str, bytes]:
    """What a conversion of the local checkpoint writes; one from the Hub must write the same."""
    root = tmp_path_factory.mktemp("hub") / "bf16"
    Command().ok("int4-to-bf16", int4, root, *SHARDS)
    return tree(root)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


SHARDS = ("--shard-size", "1MB")
