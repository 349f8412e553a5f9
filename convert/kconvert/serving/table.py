"""The table of engines and outputs, engines.toml, which says how its entries are meant; and what of it is for a directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from kconvert.serving.contents import PLAIN, Contents

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "engines.toml"
KINDS = {
    "safetensors": "a checkpoint of safetensors files",
    "amx": "AMX weights",
    "gguf": "a GGUF file",
    "mlx": "a directory for MLX",
}
RENAMED = "the experts have another model's names"
WHATEVER_WIDTH = "--to fp8 --layout compressed-tensors-channel"


@dataclass(frozen=True, slots=True)
class Engine:
    """See engines.toml; `name` is what follows `--engine`."""

    name: str
    title: str
    version: str
    package: str
    reads: Sequence[str]
    command: Sequence[str] = ()
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    share: float = 0.0
    parsers: str = ""
    instead: Sequence[str] = ()
    note: str = ""
    streams: str = ""

    def ask(self, what: str, value: object = "") -> list[str]:
        """The words on a command line by which the engine is asked for `what`; KeyError where it cannot be."""
        return [word.format(value) for word in self.flags[what]]


@dataclass(frozen=True, slots=True)
class Cell:
    """How an engine takes an output, or why it does not: see engines.toml."""

    by: str = ""
    no: str = ""
    instead: str = ""
    otherwise: str = ""
    evidence: str = "source"
    models: Sequence[str] = ()
    whole_blocks: bool = False
    source: bool = False
    flags: Sequence[str] = ()
    environment: Sequence[str] = ()
    names: Sequence[str] = ()

    def looks_for(self, expert: str) -> bool:
        """Whether the engine finds a matrix of an expert under this name."""
        return not self.names or any(fnmatchcase(expert, names) for names in self.names)


@dataclass(frozen=True, slots=True)
class Output:
    """A row: what `convert` or `repack-amx` was asked for, how a directory shows that, and a cell for each engine."""

    to: str
    cells: Mapping[str, Cell]
    layout: str = ""
    options: str = ""
    title: str = ""
    kind: str = "safetensors"
    encoding: str = "*"
    dialects: Sequence[str] = ()
    others: str = ""
    names: str = "*"
    parts: str = ""
    scale: str = ""
    activations: bool = False
    multiple: int | str = 1

    @property
    def asked(self) -> str:
        """The options that make it."""
        if self.kind == "amx":
            return f"repack-amx --method {self.to}"
        words = (
            f"--{'recipe FILE' if self.to == 'recipe' else f'to {self.to}'}",
            self.layout and f"--layout {self.layout}",
        )
        return " ".join(filter(None, (*words, self.options)))

    @property
    def is_part(self) -> bool:
        """Whether it is no model by itself: an engine takes it beside the checkpoint that it was made from."""
        return any(cell.source for cell in self.cells.values())

    def fits(self, contents: Contents) -> bool:
        """Whether the directory is such an output."""
        return (
            self.kind == contents.kind
            and fnmatchcase(contents.encoding, self.encoding)
            and (not self.dialects or contents.dialect in self.dialects)
            and self.others in ("", _kind_of(contents))
            and (not contents.width or fnmatchcase(contents.expert, self.names))
            and self.parts in ("", contents.parts)
            and self.scale in ("", contents.scale)
            and (contents.activations or not self.activations)
        )

    def unit(self, contents: Contents) -> int:
        """What the width of an expert on each GPU must be a multiple of."""
        return self.multiple if isinstance(self.multiple, int) else contents.group


def _kind_of(contents: Contents) -> str:
    """What other Linears are, beside the experts."""
    others = contents.others - PLAIN
    if contents.elsewhere or others - {contents.encoding}:
        return "mixed"
    return "same" if others else "plain"


@cache
def table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = tomllib.loads((resources.files("kconvert") / "serving" / FILE).read_text("utf-8"))
    return found


@cache
def engines() -> Mapping[str, Engine]:
    """The engines by name, in the table's order."""
    return {name: Engine(name, **entry) for name, entry in table()["engines"].items()}


@cache
def outputs() -> Sequence[Output]:
    """The rows, in the table's order."""
    rows = []
    for entry in table()["outputs"]:
        cells = {name: Cell(**entry[name]) for name in engines() if name in entry}
        rows.append(Output(cells=cells, **{key: value for key, value in entry.items() if key not in engines()}))
    return rows


def output_of(contents: Contents) -> Output | None:
    """The row that the directory is; None for what is no output of ours."""
    return next((output for output in outputs() if output.fits(contents)), None)


def cell_of(engine: Engine, output: Output, contents: Contents) -> Cell:
    """What the engine does with this directory: of a cell with conditions, the way that they turn out."""
    served = contents.manifest.serving.get(engine.name, {})
    if "no" in served:
        return Cell(no=str(served["no"]))
    if contents.kind not in engine.reads:
        what = f"it reads {KINDS[engine.reads[0]]}, and this is {KINDS[contents.kind]}"
        return Cell(no=what)
    if "weights" in engine.flags and contents.kind == "safetensors" and not contents.width:
        return Cell(no="it is for models with routed experts, and this has none")
    cell = output.cells.get(engine.name, Cell(no="nobody has tried it"))
    if cell.models and contents.model_type in cell.models:
        return replace(cell, no="", instead="")
    if contents.renamed and cell.by and not cell.names and not cell.source:
        return Cell(no=RENAMED)
    if not cell.looks_for(contents.expert):
        why = cell.no or f"its {cell.by} does not look for experts called as {contents.expert!r}"
        cell = replace(cell, no=why, instead=cell.otherwise)
    elif not cell.no and (fault := _fault(engine, cell, output.unit(contents), contents)):
        cell = replace(cell, no=fault, instead=cell.otherwise or WHATEVER_WIDTH)
    # The names of some models leave a single way to an engine.
    return replace(cell, instead=served.get("instead", cell.instead)) if cell.no else cell


def _fault(engine: Engine, cell: Cell, unit: int, contents: Contents) -> str:
    """Why a cell that holds for others does not hold for this directory; "" if it does."""
    if cell.whole_blocks and contents.ragged:
        return f"it misreads blocks that are cut off at an edge, silently, and {contents.ragged!r} has some"
    if engine.command and contents.width % unit:
        return f"an expert is {contents.width} wide, which is no multiple of {unit}"
    return ""


def takers(contents: Contents) -> Iterator[tuple[Engine, Cell]]:
    """The engines that take the directory, and how."""
    output = output_of(contents)
    for engine in engines().values() if output is not None else ():
        assert output is not None
        cell = cell_of(engine, output, contents)
        if not cell.no:
            yield engine, cell
