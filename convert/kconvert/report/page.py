"""The report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kconvert.errors import human
from kconvert.proof.parity.metrics import NAMES, spelled
from kconvert.report import plots

TABLE_ROWS = 2000  # the worst ones; all of them would make a page of many megabytes
COLUMNS = (
    "name",
    "role",
    "layer",
    "expert",
    "sqnr",
    "max_abs",
    "max_relative",
    "cosine",
    "saturated",
    "unused",
    "zero_groups",
)


def render(document: Mapping[str, Any]) -> str:
    """The page of a document of report.document, verify's or inspect's."""
    environment = Environment(
        loader=PackageLoader("kconvert.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=human, metric=_metric, number=lambda value: f"{value:,}")
    if document["schema"] == "kconvert-inspect-1":
        return environment.get_template("inspect.html").render(document, **_inspect_pictures(document))
    pictures = _verify_pictures(document)
    return environment.get_template("verify.html").render(document, **pictures, table=_table(document["results"]))


def _metric(value: float | None, name: str) -> str:
    """A metric without its name."""
    return "no error" if value is None else spelled(name, value).removeprefix(f"{NAMES[name]} ")


def _table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The weights that are furthest off, faulty ones first; a list for each, in the order of COLUMNS."""
    ranked = sorted(results, key=lambda row: (row["fault"] is None, row["sqnr"] is None, row["sqnr"] or 0.0))
    rows = [[_short(row[column]) for column in COLUMNS] + [row["fault"] is not None] for row in ranked[:TABLE_ROWS]]
    return {"columns": COLUMNS, "rows": rows, "total": len(results)}


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _verify_pictures(document: Mapping[str, Any]) -> dict[str, Any]:
    results = document["results"]
    experts: dict[str, dict[tuple[int, int], Any]] = defaultdict(dict)
    for row in results:
        if row["expert"] is not None and row["layer"] is not None:
            experts[row["role"]][row["layer"], row["expert"]] = {**row, "faults": row["fault"] is not None}
    others = {(row["role"], row["layer"]): row for row in document["layers"] if row["layer"] is not None}
    ends = plots.ends_of(cell for cells in experts.values() for cell in cells.values())
    maps = [plots.heat_map(role, cells, "layer", "expert", ends) for role, cells in experts.items()]
    if others:
        maps.append(plots.heat_map("All roles", others, "", "layer", plots.ends_of(others.values())))
    rows = _merged(document["roles"], "rows_by_sqnr")
    return {
        "heat_maps": _markup(maps),
        "errors": _markup([plots.histogram("Rows by SQNR", "SQNR of a row, dB", rows, 1.0)] if rows else []),
        **_grid_pictures(document["roles"]),
        "excerpts": _markup(plots.excerpt(worst) for worst in document["worst"]),
    }


def _inspect_pictures(document: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [(row["role"], row["layer"], row["bytes"]) for row in document["sizes"]]
    return {
        "map": _markup([plots.treemap(sizes)]),
        **_grid_pictures(document["grids"]),
    }


def _grid_pictures(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What the codes and scales of each format are like."""
    codes, scales = _merged(entries, "codes"), _merged(entries, "scales")
    octaves = {label: [[math.log2(value), count] for value, count in pairs] for label, pairs in scales.items()}
    return {
        "codes": _markup(plots.code_bars(f"Codes, {label}", pairs) for label, pairs in codes.items()),
        "scales": _markup([plots.histogram("Scales", "log2 of the scale", octaves, 0.25)] if octaves else []),
    }


def _merged(entries: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[list[float]]]:
    """The distributions `key` of all entries, summed by format; none that is empty."""
    sums: dict[str, dict[float, int]] = defaultdict(lambda: defaultdict(int))
    for entry in entries:
        for value, count in entry[key]:
            sums[entry["format"]][value] += count
    return {label: [[value, count] for value, count in sorted(found.items())] for label, found in sums.items()}


def _markup(drawings: Iterable[str]) -> list[Markup]:
    return [Markup(drawing) for drawing in drawings]  # drawn by us: text in it is escaped
