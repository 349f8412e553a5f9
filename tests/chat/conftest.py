"""Asking a scripted server, from Python and as a user does."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from chat_server import Script, serving
from click.testing import CliRunner

import kconvert
from kconvert import SmokeReport
from kconvert.cli import main


@pytest.fixture
def smoke() -> Callable[..., SmokeReport]:
    """`smoke(script, **options)` is the report on a server that follows the script."""

    def run(script: Script, **options: Any) -> SmokeReport:
        with serving(script) as url:
            return kconvert.smoke(url, **{"timeout": 20, **options})

    return run


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_command(*arguments)` is `kconvert smoke` with these."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        result = CliRunner().invoke(main, ["smoke", *map(str, arguments)], prog_name="kconvert")
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run
