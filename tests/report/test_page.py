"""The HTML report as a file: complete in itself, safe, and only there when it is true."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from click.testing import Result

import kconvert

SCHEMA = Path(kconvert.__file__).parent / "report" / "verify.schema.json"
PAGES = ("passed", "failed", "inspect")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_else(reports: Path, name: str) -> None:
    page = (reports / f"{name}.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page)
    assert not re.search(r"@import|url\(\s*[\"']?(?!#)", page)
    assert "default-src 'none'" in page
    assert len(page) < 1_000_000


def test_the_verdict_comes_first(reports: Path) -> None:
    for name, verdict in (("passed", "Verified"), ("failed", "Failed")):
        body = (reports / f"{name}.html").read_text().partition("<body>")[2]
        assert re.search(r"<h1>(.*?)</h1>", body)[1] == verdict  # type: ignore[index]
        assert body.index("<h1>") < body.index("<h2>")


def test_pictures_are_drawings_whose_colours_are_the_page_s(reports: Path) -> None:
    page = (reports / "passed.html").read_text()
    assert page.count("<svg ") >= 3 + 1 + 3 + 10  # maps of three projections and all roles, distributions, the worst
    assert "var(--ink)" in page
    assert "#010101" not in page


def test_names_out_of_a_checkpoint_are_text_and_nothing_else(
    int4: Path, int4_copy: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    hostile = int4_copy.rename(tmp_path / "<script>alert(1)<script>&$x$")
    result = run("verify", int4, hostile, "--report", tmp_path / "report.html")
    assert result.exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def truncate_header(output: Path) -> str:
    shard = sorted(output.glob("*.safetensors"))[1]
    os.truncate(shard, 20)
    return shard.name


def spoil_config(output: Path) -> str:
    (output / "config.json").write_text("{")
    return "config.json"


def remove_index(output: Path) -> str:
    (output / "model.safetensors.index.json").unlink()
    return "model.safetensors.index.json"


def remove_config(output: Path) -> str:
    (output / "config.json").unlink()
    return "config.json"


@pytest.mark.parametrize("damage", [truncate_header, spoil_config, remove_index, remove_config])
def test_an_output_that_cannot_be_read_has_a_report_with_its_fault_and_no_older_one(
    int4: Path, bf16_copy: Path, tmp_path: Path, run: Callable[..., Result], damage: Callable[[Path], str]
) -> None:
    name = damage(bf16_copy)
    for path in (tmp_path / "report.html", tmp_path / "report.json"):
        path.write_text("Verified")
        result = run("verify", int4, bf16_copy, "--report", path)
        assert result.exit_code == 1
        assert name in result.stderr
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Failed</h1>" in page
    assert name in page.partition("</header>")[0]
    report = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert report["verdict"] == "failed"
    assert (report["weights"], len(report["faults"])) == (0, 1)
    assert name in report["faults"][0]


@pytest.mark.parametrize("name", ["report.pdf", "report", "missing/report.html"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    int4: Path, bf16: Path, tmp_path: Path, run: Callable[..., Result], name: str
) -> None:
    result = run("verify", int4, bf16, "--report", tmp_path / name)
    assert result.exit_code == 2
    assert name in result.stderr
    assert not list(tmp_path.iterdir())
