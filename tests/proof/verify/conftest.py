"""`kconvert verify` in this process: importing torch anew for every test would take most of the time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kconvert import Recipe, convert, plan
from kconvert.cli import main


@pytest.fixture(scope="session")
def run_verify() -> Callable[..., Result]:
    """`run_verify(source, output, *options)`; what the command does not catch ends the test."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["verify", *map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def fp8(int4: Path) -> Path:
    """`int4` with its experts in FP8; look, do not touch (see fp8_copy)."""
    root = int4.parent / "verify-fp8"
    convert(plan(int4, Recipe("fp8")), root)
    return root


@pytest.fixture
def fp8_copy(fp8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp8, tmp_path / "fp8", ignore=shutil.ignore_patterns(".kconvert")))
