"""The table of engines as docs/ENGINES.md shows it."""

from __future__ import annotations

from collections.abc import Iterator

from kconvert.serving.table import Cell, Output, engines, outputs, table

TAKES, REFUSES, EMPTY = "Which engine takes what", "What does not go, and what goes instead", "-"


def with_tables(page: str) -> str:
    """The page with the tables of today at its end."""
    before, _, _ = page.partition(f"## {TAKES}")
    return before + "\n".join(_tables()) + "\n"


def _tables() -> Iterator[str]:
    """The lines of both tables, a heading before each."""
    titles = [engine.title for engine in engines().values()]
    yield from (f"## {TAKES}", "", f"| output | in | {' | '.join(titles)} |", f"|---|---|{'---|' * len(titles)}")
    for output in outputs():
        yield f"| {_named(output)} | {_unit(output)} | {' | '.join(_shown(output.cells.get(name)) for name in engines())} |"
    yield from ("", *(f"- *{word}*: {meaning}" for word, meaning in table()["evidence"].items()), "")
    yield from (f"## {REFUSES}", "", "| output | engine | why | instead |", "|---|---|---|---|")
    for output in outputs():
        for name, cell in output.cells.items():
            if cell.no:
                instead = f"`{cell.instead}`" if cell.instead else EMPTY
                yield f"| {_named(output)} | {engines()[name].title} | {cell.no} | {instead} |"


def _unit(output: Output) -> str:
    """What the width of an expert on each GPU is a multiple of."""
    return {1: "", "group": "N"}.get(output.multiple, f"{output.multiple}s")


def _named(output: Output) -> str:
    return f"`{output.asked}`" + (f", {output.title}" if output.title else "")


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return EMPTY
    if not cell.by:
        return f"no (*{cell.evidence}*)"
    limits = [f"of {' and '.join(cell.models)} only"] if cell.models else []
    limits += ["if no block is cut off at an edge"] if cell.whole_blocks else []
    limits += ["beside its source"] if cell.source else []
    return f"{', '.join((cell.by, *limits))} (*{cell.evidence}*)"
