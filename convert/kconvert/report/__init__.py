"""Reports for people and programs: JSON under a schema of this package, or one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import filterfalse
from pathlib import Path
from typing import Any

from kconvert.checkpoint.files import write_file
from kconvert.errors import KconvertError, explain_os_error

SUFFIXES = (".html", ".json")


def check_report_path(path: Path) -> None:
    """KconvertError unless a report can be written there; removes an older one, which must not be taken for the new."""
    if path.suffix not in SUFFIXES:
        raise KconvertError(f"{path} is neither .html nor .json; a report is one of the two, by its name")
    if path.suffix == ".html":
        # Not by importing them: whoever verifies starts processes before it draws, which would all have a part of that.
        for name in filterfalse(find_spec, ("jinja2", "matplotlib")):
            raise KconvertError(
                f"an HTML report needs {name}; pip install 'kconvert-toolkit[report]', or write the report as .json"
            )
    if not path.absolute().parent.is_dir():
        raise KconvertError(f"{path} cannot be written, there is no directory {path.absolute().parent}; make it")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, f"cannot replace {path}") from None


def write_report(document: Mapping[str, Any], path: Path) -> None:
    """`document` (see report.document) as JSON or HTML, by the suffix of `path`; whole or not at all."""
    if path.suffix == ".json":
        text = json.dumps(document, allow_nan=False) + "\n"  # indenting a large one takes 300 MB more
    else:
        from kconvert.report.page import render

        text = render(document)
    write_file(path, path.with_name(f".{path.name}.part"), text.encode())
