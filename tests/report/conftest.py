"""Reports as the command writes them, and a browser to look at them with."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kconvert.cli import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
GATE = "model.layers.1.mlp.experts.2.gate_proj"
Browse = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """`kconvert` in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def damaged(fp8: Path, raw: Any) -> Path:
    """`fp8` with a wrong scale and a missing weight."""
    root = fp8.parent / "report-damaged"
    shutil.copytree(fp8, root, ignore=shutil.ignore_patterns(".kconvert"))
    checkpoint = raw.load(root)
    scale = checkpoint[f"{GATE}.weight_scale_inv"]
    scale.data = scale.data[:3] + bytes([scale.data[3] ^ 1]) + scale.data[4:]
    checkpoint.pop("model.layers.2.mlp.experts.0.up_proj.weight")
    checkpoint.pop("model.layers.2.mlp.experts.0.up_proj.weight_scale_inv")
    checkpoint.save()
    return root


@pytest.fixture(scope="session")
def reports(int4: Path, fp8: Path, damaged: Path, run: Callable[..., Result]) -> Path:
    """A directory with passed, failed and inspect .html and .json."""
    root = int4.parent / "reports"
    root.mkdir()
    for suffix in ("html", "json"):
        assert run("verify", int4, fp8, "--report", root / f"passed.{suffix}").exit_code == 0
        assert run("verify", int4, damaged, "--report", root / f"failed.{suffix}").exit_code == 1
        assert run("inspect", int4, "--report", root / f"inspect.{suffix}").exit_code == 0
    return root


@pytest.fixture(scope="session")
def load(reports: Path) -> Callable[[str], Any]:
    """`load("passed")`: that report's JSON."""
    return lambda name: json.loads((reports / f"{name}.json").read_text())


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """`browse(page, *flags)` opens a file in headless Chromium with a fresh profile."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")

    def open_page(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    return open_page
