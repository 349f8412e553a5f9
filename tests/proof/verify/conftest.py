"""`kconvert verify` in this process: importing torch anew for every test would take most of the time."""

from __future__ import annotations

import shutil
import subprocess
import sys
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


@pytest.fixture(scope="session")
def loaded_by_verify() -> Callable[[Path, Path], str]:
    """The packages whose compiled loops a `verify` of (source, output) loads, and the modules of kernels that it imports."""
    script = (
        "import sys\n"
        "import kconvert.native as native\n"
        "from kconvert.cli import main\n"
        "load, loaded = native.Package.load, []\n"
        "native.Package.load = lambda package, *loop: loaded.append(package.name) or load(package, *loop)\n"
        "main(standalone_mode=False)\n"
        "print({*loaded, *(name for name in sys.modules if 'kernels.' in name)})\n"
    )

    def run(source: Path, output: Path) -> str:
        command = [sys.executable, "-c", script, "verify", str(source), str(output), "--quiet"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


@pytest.fixture
def fp8_copy(fp8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp8, tmp_path / "fp8", ignore=shutil.ignore_patterns(".kconvert")))
