"""`kconvert verify` in this process: importing torch anew for every test would take most of the time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kconvert.cli import main


@pytest.fixture(scope="session")
def run_verify() -> Callable[..., Result]:
    """`run_verify(source, output, *options)`; what the command does not catch ends the test."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["verify", *map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture
def fp8_copy(fp8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp8, tmp_path / "fp8", ignore=shutil.ignore_patterns(".kconvert")))
