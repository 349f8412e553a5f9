"""What would do instead where an engine does not take a directory: a conversion that can be planned of it, and whose result the
engine takes by the table; else the checkpoint that lies behind.

A layer stands for all, as in `contents`: its headers are read and planned, no tensor and no tokenizer.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import open_directory
from kconvert.errors import KconvertError
from kconvert.models.catalogue import manifest_for
from kconvert.models.model import Model, understand
from kconvert.models.roles import guess
from kconvert.serving.contents import Contents, contents_of_plan, layer_of, one_layer
from kconvert.serving.place import Place, source_of
from kconvert.serving.table import Engine, cell_of, engines, output_of, takers
from kconvert.targets.gguf.architectures import ARCHITECTURES
from kconvert.targets.mlx import MODELS
from kconvert.targets.planner import outline
from kconvert.targets.recipe import Recipe

WRITTEN = {"gguf": frozenset(ARCHITECTURES), "mlx": MODELS}  # model_types of which such an output is written


def advice(engine: Engine, place: Place, preferred: str, source: str | None = None, then: str = "") -> Iterator[str]:
    """Sentences on what would do: what makes what the engine runs, `then` to be used so, and who runs it as it is.

    `preferred` are the options that the table names; `source` is the checkpoint that it was made from, where somebody said so.
    """
    made = _conversion(engine, place, preferred)
    behind = None if made else _behind(place, source)
    if behind is not None:
        made = _of_source(engine, behind)
    elif not made and _is_made(place) and _may_run(engine, place.contents):
        made = f"give the checkpoint that it was made from{f' ({place.made_from!r})' if place.made_from else ''}"
    if made:
        yield made + then
    others = ", ".join(other.title for other, _ in takers(place.contents) if other.command)
    if others:
        yield f"{others} run{'s' * (', ' not in others)} it as it is"


def _conversion(engine: Engine, place: Place, preferred: str) -> str:
    """The sentence with the command that makes of `place` what the engine takes; "" where none does."""
    revision = "" if place.revision is None else f" --revision {shlex.quote(place.revision)}"
    for options in _possible(engine, place, preferred):
        return f"`kconvert convert {shlex.quote(place.address)} DST {options}{revision}` makes what it runs"
    return ""


def _possible(engine: Engine, place: Place, preferred: str) -> Iterator[str]:
    """The options of conversions that can be planned and whose result the engine takes, the best first."""
    if place.checkpoint is None or place.contents.renamed:  # whose names are no model's, and stay
        return
    with suppress(KconvertError):  # what cannot be read cannot be converted
        model = _sample(place)
        for options in dict.fromkeys(filter(None, (preferred, *engine.instead))):
            with suppress(KconvertError):
                if takes(engine, _planned(model, options), place.contents):
                    yield options


def takes(engine: Engine, contents: Contents, source: Contents) -> bool:
    """Whether the engine takes these, beside `source` where they are no model by themselves."""
    output = output_of(contents)
    if output is None:
        return False
    cell = cell_of(engine, output, contents)
    return not cell.no and (not cell.source or takes(engines()["sglang"], source, source))


def _planned(model: Model, options: str) -> Contents:
    """What the conversion with these options makes of the model; KconvertError where it cannot be had."""
    plan = outline(model, recipe_of(options))
    return Contents("gguf", {}, 0) if plan is None else contents_of_plan(plan)


def recipe_of(options: str) -> Recipe:
    """What `kconvert convert SRC DST` with these options is to make."""
    words = options.split()
    asked = dict(zip(words[::2], words[1::2], strict=True))
    recipe = Recipe(asked.pop("--to"), layout=asked.pop("--layout", ""))
    size = asked.pop("--group-size", None)
    assert not asked
    return recipe if size is None else replace(recipe, group_size=int(size))


def _sample(place: Place) -> Model:
    """The model up to its first layer of experts, without those of other layers."""
    assert place.checkpoint is not None
    contents, checkpoint = place.contents, place.checkpoint
    if place.root is not None:
        checkpoint = open_directory(place.root, enough=_until_complete(contents))
    return understand(one_layer(checkpoint, contents.expert, dense=True), partial=True)


def _until_complete(contents: Contents) -> Callable[[Iterable[Tensor]], bool]:
    """Whether the files read so far have the whole layer of that expert: all experts, and the last one has nothing of it."""
    layer, count = layer_of(contents.expert), contents.experts or 0
    begun, numbers = False, set[int]()

    def enough(tensors: Iterable[Tensor]) -> bool:
        nonlocal begun
        names = [tensor.name for tensor in tensors if layer and tensor.name.startswith(layer)]
        begun = begun or bool(names)
        numbers.update(n for name in names if (n := guess(name.rpartition(".")[0]).expert) is not None)
        return begun and not names and (not numbers or len(numbers) >= count > 0)

    return enough


def _is_made(place: Place) -> bool:
    """Whether it is something that is made of a checkpoint, and from which there is no way back."""
    output = output_of(place.contents)
    return place.contents.kind != "safetensors" or place.contents.renamed or (output is not None and output.is_part)


def _behind(place: Place, source: str | None) -> Place | None:
    """The checkpoint on this machine that the place was made from, where that can be found out."""
    if not _is_made(place) or not (source or place.made_from):
        return None
    with suppress(KconvertError):
        found = source_of(place, source)
        return found if found.root is not None and not os.path.samefile(found.root, place.root or "/") else None
    return None


def _of_source(engine: Engine, source: Place) -> str:
    """What would do with this checkpoint, which a place was made from."""
    if takes(engine, source.contents, source.contents):
        return f"{engine.title} runs {source.address}, which it was made from"
    return _conversion(engine, source, "")


def _may_run(engine: Engine, contents: Contents) -> bool:
    """Whether the engine runs such a model in some encoding, as far as that is known."""
    # A GGUF file has llama.cpp's name of its model, which several may share.
    kinds = {kind for kind, name in ARCHITECTURES.items() if name == contents.architecture} or {contents.model_type}
    written = WRITTEN.get(engine.reads[0])
    if written is not None and not kinds <= written:
        return False
    return not all("no" in manifest_for({"model_type": kind}).serving.get(engine.name, {}) for kind in kinds)
