"""What a user wants to have served: a directory, a GGUF file, a repository of the Hub or objects of a store, as an engine is
told of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kconvert.address import open_checkpoint
from kconvert.checkpoint.gguf_files import is_gguf, open_gguf
from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME, STATE_DIR, what_finishes
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint, open_directory
from kconvert.errors import KconvertError
from kconvert.hub.ids import parse_hub_id
from kconvert.models.amx import RECORD, AmxModel, is_amx, open_amx
from kconvert.planning.plan import Plan
from kconvert.serving.contents import Contents, contents_of, contents_of_amx, contents_of_plan, holds_expert, is_plain
from kconvert.stores.urls import parse_store_url

TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
THOUGHT, TOOLS = "think", "tool"


@dataclass(frozen=True)
class Place:
    """`address` is what an engine is told: a whole path, a store's address, or a Hub id, of which `revision` is asked for.

    `root` is the directory, None of what is `stored` in an object store, or on the Hub. `remote_code`: its own code has to be
    run. `thinks` is False where its chat template shows that the model does not. `made_from` is the source of weights without
    their model, as their record has it. `checkpoint` is what was read of it, where it may be converted.
    """

    address: str
    contents: Contents
    root: Path | None = None
    revision: str | None = None
    remote_code: bool = False
    thinks: bool = True
    made_from: str = ""
    stored: bool = False
    checkpoint: Checkpoint | None = field(default=None, repr=False)


def look_at(address: str, revision: str | None = None) -> Place:
    """What is there, from headers; KconvertError where it is nothing that an engine could load."""
    if (objects := parse_store_url(address)) is not None:
        checkpoint = open_checkpoint(address, revision)
        return replace(_place(checkpoint, contents_of(checkpoint), str(objects)), stored=True)
    hub = parse_hub_id(address)
    if is_gguf(address):
        gguf = open_gguf(address)
        nbytes = sum(stat.nbytes for stat in gguf.files.values())
        return Place(str(gguf.title), Contents("gguf", {}, nbytes, architecture=gguf.architecture), gguf.root)
    if hub is not None and not os.path.lexists(address):
        checkpoint = open_checkpoint(address, revision)
        return _place(checkpoint, contents_of(checkpoint), hub.repo, revision or hub.revision)
    root = Path(os.path.abspath(address))
    if is_amx(root):
        _check_finished(root, (RECORD,) if (root / STATE_DIR).is_dir() else ())
        return place_of_amx(open_amx(root, glance=True))
    checkpoint = open_directory(address, revision, enough=_enough)
    # Our conversions write config.json and the index last; others may have a single file and no index.
    _check_finished(checkpoint.root, (CONFIG_NAME, INDEX_NAME) if (root / STATE_DIR).is_dir() else (CONFIG_NAME,))
    contents = contents_of(checkpoint)
    if is_plain(contents):
        checkpoint = open_directory(address, revision)
        contents = contents_of(checkpoint)
    return _place(checkpoint, contents, str(checkpoint.root))


def place_of_amx(model: AmxModel) -> Place:
    """A directory of AMX weights."""
    made_from = _made_from(model.record)
    return Place(str(model.checkpoint.root), contents_of_amx(model), model.checkpoint.root, made_from=made_from)


def place_of_plan(plan: Plan, destination: str) -> Place:
    """The AMX weights that the plan will write there."""
    record = json.loads(bytes(plan.texts[RECORD]))
    root = Path(os.path.abspath(destination))
    return Place(str(root), contents_of_plan(plan), root, made_from=_made_from(record))


def source_of(place: Place, asked: str | None) -> Place:
    """The checkpoint that lies behind weights without the rest of a model: the one `asked` for, or the recorded one.

    A recorded name without a path is looked for beside the weights. KconvertError where there is none.
    """
    where = asked or place.made_from
    if not where:
        raise KconvertError(f"{place.address} does not say which checkpoint it was made from; give that with --source")
    beside = None if place.root is None else place.root.parent / where
    if asked is None and beside is not None and beside.is_dir():
        return look_at(str(beside))
    hub = parse_hub_id(where)
    if asked is None and hub is None:
        raise KconvertError(
            f"{place.address} was made from {where!r}, which does not lie beside it; say where it is with --source"
        )
    if hub is not None and not os.path.lexists(where):
        # Nothing of it is fetched only to be told where it is.
        return Place(hub.repo, place.contents, None, hub.revision, "auto_map" in place.contents.config)
    return look_at(where)


def _made_from(record: Mapping[str, Any]) -> str:
    """The source that a record names."""
    source, revision = (str(record.get(key) or "") for key in ("source", "revision"))
    return f"{source}@{revision}" if source and revision else source


def _check_finished(root: Path, wanted: Iterable[str]) -> None:
    missing = next((name for name in wanted if not (root / name).exists()), None)
    if missing is not None:
        help = what_finishes(root)
        advice = f"it is unfinished, {help}" if help else "no engine loads it without; fetch that"
        raise KconvertError(f"{root} has no {missing}: {advice}")


def _enough(tensors: Iterable[Tensor]) -> bool:
    return holds_expert(tensor.name for tensor in tensors)


def _place(checkpoint: Checkpoint, contents: Contents, address: str, revision: str | None = None) -> Place:
    tokenizer = _json(checkpoint, TOKENIZER)
    remote_code = any("auto_map" in table for table in (contents.config, tokenizer))
    template = _text(checkpoint, TEMPLATE) or str(tokenizer.get("chat_template") or "")
    thinks = THOUGHT in template or TOOLS not in template
    root = None if checkpoint.directory is None else checkpoint.root
    made_from = _made_from(_json(checkpoint, RECORD))
    return Place(address, contents, root, revision, remote_code, thinks, made_from, checkpoint=checkpoint)


def _text(checkpoint: Checkpoint, name: str) -> str:
    if not checkpoint.has(name):
        return ""
    return checkpoint.side_file(name).read_bytes().decode("utf-8", "replace")


def _json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """A file that is the engine's to complain of; what is no table says nothing."""
    try:
        table = json.loads(_text(checkpoint, name) or "{}")
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
