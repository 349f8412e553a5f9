"""The command by which an engine serves what is in a directory, or the sentence why it cannot."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kconvert.errors import KconvertError, counted, human
from kconvert.serving.experts import Experts, on_the_cpu
from kconvert.serving.memory import CONTEXT_KEYS, Room, check_room
from kconvert.serving.place import Place, source_of
from kconvert.serving.table import Cell, Engine, Output, cell_of, engines, output_of
from kconvert.serving.wishes import Wishes


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that starts an engine, how that takes the weights (`by`), the room on each GPU, and what is worth knowing."""

    engine: Engine
    command: Sequence[str]
    by: str
    room: Room | None
    notes: Sequence[str]

    @property
    def line(self) -> str:
        return shlex.join(self.command)

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "engine": self.engine.name,
            "package": self.engine.package,
            "by": self.by,
            "command": list(self.command),
            "line": self.line,
            "notes": list(self.notes),
        }
        if self.room is not None:
            facts |= {"weight_bytes_per_gpu": self.room.weights, "usable_bytes_per_gpu": self.room.usable}
            facts |= {"cache_tokens": self.room.tokens} if self.room.token else {}
        return facts


def launch(place: Place, engine: str, wishes: Wishes | None = None, source: Place | None = None) -> Launch:
    """The command by which the engine of this name serves `place`; KconvertError, with what would do instead, if it cannot.

    `source` is the checkpoint that weights without their model were made from, where it is known already.
    """
    wishes, served = wishes or Wishes(), engines()[engine]
    output, cell = _taken(place, served, wishes.source)
    wishes.check(served, cell.source)
    model = (source or source_of(place, wishes.source)) if cell.source else place
    if cell.source and model.root is not None:
        _taken(model, engines()["sglang"], then=", to be given with --source")  # which runs all but the experts of it
        _check_source(place, model)
    _check_stored(served, place, model)
    gpus = wishes.gpus or 1
    environment = ["env", *cell.environment] if cell.environment else []
    words = [*environment, *(word.format(model.address) for word in served.command), *_told(served, model, place)]
    if wishes.gpus is not None:
        _check_heads(model, gpus)
        words += served.ask("gpus", gpus)
    if wishes.context is not None:
        words += served.ask("context", _possible(place, wishes.context))
    shared = _on_the_gpus if "weights" not in served.flags else on_the_cpu
    experts = shared(served, place, model, output, cell, wishes)
    notes = [*filter(None, (served.note, served.streams if place.stored else "")), *experts.notes]
    if wishes.source == model.address and model.root is None:  # nobody has looked whether it is there
        notes.append(f"no directory here is called {model.address}: {served.title} is to look for it on the Hub")
    notes += _roomy(served, experts.room)
    return Launch(served, (*words, *experts.words, *wishes.more), cell.by, experts.room, notes)


def _taken(place: Place, engine: Engine, source: str | None = None, then: str = "") -> tuple[Output, Cell]:
    """How the engine takes what is there; KconvertError where it does not, with what is to be done `then`."""
    contents = place.contents
    output = output_of(contents)
    cell = Cell() if output is None else cell_of(engine, output, contents)
    if output is not None and not cell.no:
        return output, cell
    from kconvert.serving.remedies import advice

    instead = ", and ".join(advice(engine, place, cell.instead, source, then))
    what = contents.encodings
    if output is None:
        what += f", declared as {contents.dialect}" if contents.dialect else ""
        fault = f"{place.address} is {what}, and whether {engine.title} runs that kconvert does not know"
        raise KconvertError("; ".join(filter(None, (fault, instead))))
    what = what if contents.kind == "safetensors" else output.to.upper()
    raise KconvertError(
        f"{engine.title} cannot run {place.address} ({what}): {cell.no}; "
        + (instead or "no other engine is known to run it either")
    )


def _told(engine: Engine, model: Place, place: Place) -> Iterator[str]:
    """What the engine has to be told of the model itself."""
    if model.revision is not None:
        yield from ("--revision", model.revision)
    if model.remote_code and "remote_code" in engine.flags:
        yield from engine.ask("remote_code")
    if model.stored:
        yield from engine.ask("store")
    contents = model.contents if model.contents.config else place.contents
    serving = contents.manifest.serving.get(engine.parsers or engine.name, {})
    yield from serving.get("flags", ())
    for what in ("tools", "reasoning"):
        if what in serving and (what == "tools" or model.thinks):
            yield from engine.ask(what, serving[what])


def _check_stored(engine: Engine, *places: Place) -> None:
    """KconvertError where the engine cannot read what is in an object store."""
    for place in places:
        if place.stored and not engine.streams:
            streaming = " and ".join(other.title for other in engines().values() if other.streams)
            raise KconvertError(
                f"{engine.title} reads from a directory, not from an object store; copy {place.address} with the store's own "
                f"tools and give the directory, or give another --engine: {streaming} can"
            )


def _possible(place: Place, context: int) -> int:
    most = place.contents.number(*CONTEXT_KEYS)
    if most is not None and context > most:
        raise KconvertError(
            f"{place.address} has a context of {most:,} tokens, and {context:,} are more; give --context {most}"
        )
    return context


def _check_source(place: Place, model: Place) -> None:
    """KconvertError where the experts of `place` are none of this model's."""
    here, there = ((contents.width, contents.hidden) for contents in (place.contents, model.contents))
    if all(here) and not all(there):
        raise KconvertError(
            f"{model.address} has no routed experts; give the checkpoint that {place.address} was made from with --source"
        )
    if all(here) and here != there:
        raise KconvertError(
            f"{place.address} has experts of {here[0]} x {here[1]}, and those of {model.address} are {there[0]} x {there[1]}; "
            "give the checkpoint that it was made from with --source"
        )


def _check_heads(model: Place, gpus: int) -> None:
    """KconvertError where that many GPUs cannot share the heads of attention."""
    heads = model.contents.number("num_attention_heads")
    if heads is not None and heads % gpus:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise KconvertError(
            f"{model.address} has {counted(heads, 'attention head')}, which {counted(gpus, 'GPU')} cannot share; give "
            f"--gpus {fitting}"
        )


def _on_the_gpus(engine: Engine, place: Place, model: Place, output: Output, cell: Cell, wishes: Wishes) -> Experts:
    """All of the model on the GPUs; KconvertError where they cannot share it, or hold it."""
    contents, unit, gpus = place.contents, output.unit(place.contents), wishes.gpus or 1
    words = _parallel(engine, place, unit, gpus) if engine.share else []
    room = None
    if wishes.gpu_memory is not None:
        room = check_room(engine, contents, contents.nbytes, gpus, wishes.gpu_memory, wishes.context)
    notes = [
        f"{counted(gpus, 'GPU')} cannot share {name!r} in blocks of {unit}, and {engine.title} may refuse it: fewer GPUs can"
        for name, length in contents.sliced.items()
        if contents.others == {contents.encoding} and length % (gpus * unit)
    ]
    return Experts(words, room, notes[:1])


def _parallel(engine: Engine, place: Place, unit: int, gpus: int) -> list[str]:
    """What lets that many GPUs share the experts; KconvertError where nothing does.

    An engine that is told the number of groups among which whole experts are dealt out wants as many of them in each, and each
    group's GPUs cut them: the more groups, the wider the cuts.
    """
    contents, experts = place.contents, place.contents.experts
    if contents.width % (gpus * unit) == 0:
        return []
    if experts is None or not any("{}" in word for word in engine.flags["expert_parallel"]):
        return engine.ask("expert_parallel", gpus)

    def groups(gpus: int) -> Iterator[int]:
        fitting = (n for n in range(gpus, 0, -1) if gpus % n == 0 == experts % n)
        return (n for n in fitting if contents.width % (gpus // n * unit) == 0)

    for found in groups(gpus):
        return engine.ask("expert_parallel", found)
    heads = contents.number("num_attention_heads") or 0
    fewer = next(n for n in range(gpus - 1, 0, -1) if heads % n == 0 and any(groups(n)))
    raise KconvertError(
        f"{counted(gpus, 'GPU')} cannot share {counted(experts, 'expert')} of a width of {contents.width}, in {unit}s or by "
        f"dealing out as many to each; give --gpus {fewer}"
    )


def _roomy(engine: Engine, room: Room | None) -> Iterator[str]:
    if room is not None:
        cache = f", which holds {room.tokens:,} tokens" if room.token else ""
        yield (
            f"each GPU has {human(room.weights)} of weights; {engine.title} keeps {human(room.usable - room.weights)} for its "
            f"cache{cache}"
        )
