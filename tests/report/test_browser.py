"""The HTML report in a real browser: it opens from disk without errors, sorts and filters, and looks right."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Browse = Callable[..., "subprocess.CompletedProcess[str]"]


def with_script(page: Path, target: Path, script: str) -> Path:
    """A copy of a page that runs `script` at its end."""
    target.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return target


def rows_of(dom: str) -> list[list[str]]:
    table = dom[dom.index('<table id="weights">') :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", body)]


@pytest.mark.parametrize("name", ["passed", "failed", "inspect"])
def test_a_page_opens_from_disk_without_an_error(reports: Path, browse: Browse, name: str) -> None:
    done = browse(reports / f"{name}.html", "--dump-dom", "--enable-logging=stderr", "--v=0")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<svg ") >= 3


def test_the_table_has_every_weight_the_worst_first(reports: Path, browse: Browse) -> None:
    rows = rows_of(browse(reports / "failed.html", "--dump-dom").stdout)
    assert len(rows) > 40
    assert rows[0][0] == "model.layers.1.mlp.experts.2.gate_proj"


def test_the_table_filters_by_words_and_columns(reports: Path, browse: Browse, tmp_path: Path) -> None:
    script = "const box = document.getElementById('filter'); box.value = 'UP_proj layer:2 expert:3';"
    page = with_script(
        reports / "passed.html", tmp_path / "page.html", f"{script} box.dispatchEvent(new Event('input'));"
    )
    dom = browse(page, "--dump-dom").stdout
    assert [row[0] for row in rows_of(dom)] == ["model.layers.2.mlp.experts.3.up_proj"]
    assert re.search(r'id="count"[^>]*>1 of ', dom)


@pytest.mark.parametrize("clicks", [1, 2])
def test_the_table_sorts_by_a_column_up_and_down(reports: Path, browse: Browse, tmp_path: Path, clicks: int) -> None:
    click = "document.querySelectorAll('#weights th')[4].click();"
    page = with_script(reports / "passed.html", tmp_path / "page.html", click * clicks)
    column = [row[4] for row in rows_of(browse(page, "--dump-dom").stdout)]
    ratios = [float("inf") if text == "no error" else float(text) for text in column]
    assert ratios == sorted(ratios, reverse=clicks == 2)
    assert len(set(ratios)) > 5


SCHEMES = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [500, 1200])
def test_a_page_fits_its_window_in_light_and_dark(
    reports: Path, browse: Browse, tmp_path: Path, scheme: str, width: int
) -> None:
    report = "[document.documentElement.scrollWidth, innerWidth, getComputedStyle(document.body).backgroundColor]"
    page = with_script(reports / "failed.html", tmp_path / "page.html", f"document.title = {report}.join('|')")
    window = (SCHEMES[scheme], f"--window-size={width},1500")
    title = re.search(r"<title>(\d+)\|(\d+)\|(.*?)</title>", browse(page, *window, "--dump-dom").stdout)
    assert title is not None
    assert int(title[1]) <= int(title[2])
    brightness = sum(map(int, re.findall(r"\d+", title[3])[:3])) / 3
    assert (brightness > 200) if scheme == "light" else (brightness < 60)
    browse(reports / "failed.html", *window, f"--screenshot={tmp_path / 'page.png'}")
    picture = (tmp_path / "page.png").read_bytes()
    assert struct.unpack(">2I", picture[16:24]) == (width, 1500)
    assert len(picture) > 20_000  # an empty page is a few kilobytes
