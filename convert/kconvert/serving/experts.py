"""KTransformers: experts in the memory of the CPU, all else (and some experts) on the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kconvert.errors import KconvertError, counted
from kconvert.serving.contents import Contents
from kconvert.serving.machine import numa_nodes, physical_cores
from kconvert.serving.memory import CONTEXT_KEYS, Room, check_room
from kconvert.serving.place import Place
from kconvert.serving.table import Cell, Engine, Output
from kconvert.serving.wishes import Wishes


@dataclass(frozen=True, slots=True)
class Experts:
    """What the engine is told of experts, the room on each GPU, and what is worth knowing."""

    words: list[str]
    room: Room | None
    notes: Sequence[str]


def on_the_cpu(engine: Engine, place: Place, model: Place, output: Output, cell: Cell, wishes: Wishes) -> Experts:
    """The experts of `place` on the CPU, and the rest of `model` on the GPUs."""
    if place.root is None:
        raise KconvertError(
            f"{engine.title} reads experts from a directory, not from the Hub; fetch {place.address} with `hf download` and "
            "give the directory"
        )
    numa = _nodes(engine, place, output, wishes)
    cores = wishes.cores or max(physical_cores(), numa)
    if cores < numa:
        otherwise = "" if place.contents.numa else ", or leave out --numa"
        raise KconvertError(
            f"{counted(numa, 'NUMA node')} want a core each, and --cores is {cores}; give --cores {numa} or more{otherwise}"
        )
    count, room = _experts_on_gpus(engine, model, wishes)
    if count and place.contents.width % ((wishes.gpus or 1) * output.unit(place.contents)):
        raise KconvertError(
            f"{counted(wishes.gpus or 1, 'GPU')} cannot share experts of a width of {place.contents.width} in "
            f"{output.unit(place.contents)}s, and {engine.title} knows no other way; give fewer --gpus, or --gpu-experts 0"
        )
    words = [
        *cell.flags,
        *engine.ask("cores", cores),
        *engine.ask("gpu_experts", count),
        *engine.ask("weights", place.address),
        *engine.ask("method", cell.by),
        *engine.ask("numa", numa),
    ]
    notes = []
    if wishes.cores is None:
        notes.append(f"--kt-cpuinfer has the {counted(cores, 'core')} of this machine; --cores says another number")
    if count == 0 and wishes.gpu_experts is None:
        known = " that fit" if wishes.gpu_memory is not None else "; --gpus and --gpu-memory find how many would fit"
        notes.append(f"there are no experts on GPUs{known}")
    return Experts(words, room, notes)


def _nodes(engine: Engine, place: Place, output: Output, wishes: Wishes) -> int:
    """The NUMA nodes that share each expert; KconvertError where they cannot."""
    contents = place.contents
    if contents.numa:
        if wishes.numa is not None and wishes.numa != contents.numa:
            from kconvert.targets.amx import check_numa

            check_numa(int(contents.encoding[-1]), wishes.numa, contents.hidden, contents.width)
            raise KconvertError(
                f"{place.address} is split for {counted(contents.numa, 'NUMA node')}, not {wishes.numa}; `kconvert repack-amx "
                f"--from-amx {place.address} DST --numa {wishes.numa}` splits it anew"
            )
        return contents.numa
    unit, most = output.unit(contents), wishes.numa or min(numa_nodes(), wishes.cores or numa_nodes())
    possible = [n for n in range(1, most + 1) if contents.width % (n * unit) == 0]
    if wishes.numa is not None and most not in possible:
        raise KconvertError(
            f"{engine.title} cannot split experts of a width of {contents.width} for {counted(most, 'NUMA node')}, in {unit}s; "
            f"give --numa {max((n for n in possible if n <= (wishes.cores or n)), default=1)}"
        )
    return max(possible, default=1)


def _experts_on_gpus(engine: Engine, model: Place, wishes: Wishes) -> tuple[int, Room | None]:
    """The number of experts of each layer on the GPUs: what was asked for, or what fits; and the room with these."""
    contents, memory, gpus = model.contents, wishes.gpu_memory, wishes.gpus or 1
    experts = contents.experts or 0
    asked = wishes.gpu_experts or 0
    if experts and asked > experts:
        raise KconvertError(
            f"{model.address} has {counted(experts, 'expert')} a layer; give --gpu-experts {experts} or fewer"
        )
    nbytes = _expert_bytes(contents)
    if memory is None or not nbytes or not experts:
        return asked, None
    rest, one = max(0, contents.nbytes - nbytes), nbytes / experts
    room = check_room(engine, contents, rest + int(asked * one), gpus, memory, wishes.context)
    if wishes.gpu_experts is not None:
        return asked, room
    spare = room.usable - room.weights - room.token * (wishes.context or contents.number(*CONTEXT_KEYS) or 0)
    count = min(experts, int(spare * gpus / one))
    return count, check_room(engine, contents, rest + int(count * one), gpus, memory, wishes.context)


def _expert_bytes(contents: Contents) -> int:
    """The bytes of all routed experts; 0 where the model's sizes are not known."""
    if contents.kind != "safetensors" or contents.manifest.accepts_any:
        return 0
    try:
        parameters = contents.manifest.bind(dict(contents.config)).parameters("expert")
    except KconvertError:
        return 0
    return int(parameters * contents.density)
