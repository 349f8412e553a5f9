"""The pictures of a report as SVG to be put into a page: matplotlib draws, the page's style sheet colours.

Colours are drawn as placeholders and become the page's CSS variables, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# placeholder -> CSS variable
COLOURS = {
    "#010101": "--ink",
    "#020202": "--faint",
    "#030303": "--bad",
    "#040401": "--series-1",
    "#040402": "--series-2",
    "#040403": "--series-3",
    "#040404": "--series-4",
    "#040405": "--series-5",
    "#040406": "--series-6",
    "#050505": "--good",
    "#060606": "--paper",
}
INK, FAINT, BAD, *SERIES, GOOD, PAPER = COLOURS
STYLE: Any = {  # matplotlib's type lists every key
    "svg.fonttype": "none",
    "svg.hashsalt": "kconvert",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
LEAST_RANGE = 3.0  # dB from one end of a heat map's colours to the other: less is no difference worth a colour
WIDTH = 7.2  # inches; pictures scale down with the page
LEGEND_COLUMNS = 3


def heat_map(
    title: str, cells: Mapping[tuple[Any, int], Mapping[str, Any]], down: str, across: str, ends: tuple[float, float]
) -> str:
    """SQNR in dB of cells {(row, column): metrics}; those without any error have a colour of their own, faults a mark.

    `down` and `across` say what rows (names or numbers) and columns (numbers) are; `ends` are the darkest and the brightest.
    """
    import numpy as np

    rows, cols = _places(row for row, _ in cells), _places(col for _, col in cells)
    values = np.full((len(rows), len(cols)), np.nan)
    for (row, col), cell in cells.items():
        values[rows[row], cols[col]] = math.inf if cell["sqnr"] is None else cell["sqnr"]
    with mpl.rc_context(STYLE):
        longest = max(len(str(row)) for row in rows)
        axes = _axes(min(4.5, 1.1 + 0.16 * len(rows)), left=0.45 + 0.08 * longest, right=0.85)
        colours = mpl.colormaps["viridis"].with_extremes(over=GOOD, bad="none")
        shown = np.ma.masked_invalid(np.where(np.isposinf(values), 1e9, values))
        mesh = axes.pcolormesh(shown, cmap=colours, norm=mpl.colors.Normalize(*ends))
        mesh.set_rasterized(values.size > 4000)  # a bitmap is smaller then
        axes.set(title=title, xlabel=across, ylabel=down)
        axes.set_xticks(*_ticks(cols))
        axes.set_yticks(*_ticks(rows))
        axes.invert_yaxis()
        for (row, col), cell in cells.items():
            if cell["faults"]:
                axes.plot(cols[col] + 0.5, rows[row] + 0.5, "x", color="#ff3b30", markersize=5, markeredgewidth=1.6)
        if np.isfinite(values).any():
            beside = axes.inset_axes((1.03, 0, 0.025, 1))
            extend = "max" if np.isposinf(values).any() else "neither"
            axes.figure.colorbar(mesh, cax=beside, label="SQNR, dB", extend=extend)
        return _svg(axes.figure)


def ends_of(cells: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Lowest and highest SQNR of cells for heat_map; where all are about the same, all are bright."""
    found = [cell["sqnr"] for cell in cells if cell["sqnr"] is not None] or [0.0]
    return min(*found, max(found) - LEAST_RANGE), max(found)


def _places(keys: Iterable[Any]) -> dict[Any, int]:
    """Where each key stands: numbers in order, names as they come."""
    unique = list(dict.fromkeys(keys))
    return {key: place for place, key in enumerate(unique if isinstance(unique[0], str) else sorted(unique))}


def _ticks(places: Mapping[Any, int]) -> tuple[list[float], list[str]]:
    """The middles of the cells that are labelled, every name but only some numbers, and the labels."""
    step = 1 if isinstance(next(iter(places)), str) else math.ceil(len(places) / 12)
    shown = {key: place for key, place in places.items() if place % step == 0}
    return [place + 0.5 for place in shown.values()], [str(key) for key in shown]


def histogram(title: str, xlabel: str, series: Mapping[str, Sequence[Sequence[float]]], width: float) -> str:
    """Shares by value, a line for each of `series` {label: [[lower bound, count], ...]}; bins of `width`."""
    with mpl.rc_context(STYLE):
        axes = _axes(2.4, above=math.ceil(len(series) / LEGEND_COLUMNS))
        for (label, pairs), colour in zip(series.items(), _cycle(SERIES), strict=False):
            total = sum(count for _, count in pairs)
            found = {round(value / width): count / total for value, count in pairs}
            places = range(min(found) - 1, max(found) + 2)
            heights = [100 * found.get(place, 0.0) for place in places]
            edges = [place * width for place in (*places, places[-1] + 1)]
            axes.stairs(heights, edges, color=colour, label=label, linewidth=1.4)
        axes.set(title=title, xlabel=xlabel, ylabel="%")
        axes.grid(axis="y")
        axes.legend(ncols=LEGEND_COLUMNS, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        return _svg(axes.figure)


def code_bars(title: str, pairs: Sequence[Sequence[float]]) -> str:
    """How often each code occurs, in percent, in the order of their values."""
    total = sum(count for _, count in pairs) or 1
    with mpl.rc_context(STYLE):
        axes = _axes(2.2)
        axes.bar(range(len(pairs)), [100 * count / total for _, count in pairs], width=0.85, color=SERIES[0])
        axes.set(title=title, xlabel="code", ylabel="%")
        step = max(1, math.ceil(len(pairs) / 16))
        shown = range(len(pairs) // 2 % step, len(pairs), step)  # zero among them
        axes.set_xticks(list(shown), [f"{float(f'{pairs[place][0]:.2g}'):g}" for place in shown])
        axes.grid(axis="y")
        return _svg(axes.figure)


def _axes(height: float, above: int = 1, left: float = 0.55, right: float = 0.1) -> Any:
    """The axes of a picture so many inches high, with room for so many lines of a title or legend above them, and so many
    inches on either side.

    To have matplotlib find the margins takes as long as to draw.
    """
    below, top = 0.45, 0.1 + 0.2 * above
    across, up = WIDTH - left - right, height - below - top
    return Figure(figsize=(WIDTH, height)).add_axes((left / WIDTH, below / height, across / WIDTH, up / height))


def excerpt(worst: Mapping[str, Any]) -> str:
    """The values on both sides around the worst element of a weight."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 2, 1.6))
        axes = figure.add_axes((0.16, 0.27, 0.82, 0.56))
        columns = range(worst["first_col"], worst["first_col"] + len(worst["source_values"]))
        axes.axvspan(worst["col"] - 0.5, worst["col"] + 0.5, color=BAD, alpha=0.25, linewidth=0)
        axes.step(
            columns, worst["source_values"], where="mid", color=SERIES[0], linewidth=2.6, alpha=0.6, label="source"
        )
        axes.step(columns, worst["output_values"], where="mid", color=SERIES[1], linewidth=1.2, label="output")
        axes.set_xlabel(f"column (row {worst['row']})")
        axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 0.95))
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
        return _svg(figure)


def treemap(sizes: Iterable[tuple[str, int | None, int]]) -> str:
    """Areas by bytes of (role, layer, bytes): a column for each role, in it a box for each layer."""
    columns: dict[str, list[tuple[int | None, int]]] = {}
    for role, layer, nbytes in sizes:
        columns.setdefault(role, []).append((layer, nbytes))
    totals = {role: sum(nbytes for _, nbytes in boxes) for role, boxes in columns.items()}
    whole = sum(totals.values()) or 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axes = figure.add_subplot()
        left = 0.0
        order = sorted((role for role in totals if totals[role]), key=lambda role: -totals[role])
        for role, colour in zip(order, _cycle(SERIES), strict=False):
            wide = totals[role] / whole
            _column(axes, left, wide, columns[role], colour)
            _name_column(axes, left + wide / 2, wide, role)
            left += wide
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.axis("off")
        return _svg(figure)


def _name_column(axes: Axes, middle: float, wide: float, role: str) -> None:
    """Upright above the column; not at all where there is no room for it."""
    if wide > 0.02:
        axes.text(middle, 1.02, f"{role}  {100 * wide:.1f}%", ha="center", va="bottom", fontsize=8, rotation=90)


def _column(axes: Axes, left: float, wide: float, boxes: Sequence[tuple[int | None, int]], colour: str) -> None:
    total = sum(nbytes for _, nbytes in boxes)
    top = 1.0
    for layer, nbytes in boxes:
        high = nbytes / total
        axes.add_patch(
            mpl.patches.Rectangle((left, top - high), wide, high, facecolor=colour, edgecolor=PAPER, linewidth=0.6)
        )
        if layer is not None and wide > 0.05 and high > 0.03:
            axes.text(left + wide / 2, top - high / 2, str(layer), ha="center", va="center", fontsize=7, color=PAPER)
        top -= high


def _cycle(colours: Sequence[str]) -> Iterable[str]:
    while True:
        yield from colours


def _svg(figure: Figure) -> str:
    """The figure as an SVG element that scales with the page and takes its colours from it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in COLOURS.items():
        text = text.replace(placeholder, f"var({variable})")
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text.replace("\n", " "), count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
