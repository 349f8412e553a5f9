"""The quantised checkpoint of a trained model, streamed: its experts are the values that training saw.

They go under their per-expert names through the encoder of the grid, a few at a time; everything else keeps its dtype. Where
training began with a checkpoint on the same grid, other than INT4, everything goes back into the encoding that it has there.
The plan, the journal and the writer of shards are those of a conversion. The engine is not: its source is files, and an
export must never be resumed, because the weights may have changed in between.

After a whole export a patch has what changed since, for rollouts that follow a training, see export.patch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import kconvert
from kconvert.address import address
from kconvert.errors import KconvertError
from kconvert.planning.plan import Plan
from kconvert.run.state.finalize import finalize
from kconvert.run.state.journal import Journal
from kconvert.targets.base import DEFAULT_SHARD_SIZE
from kconvert_qat.attach import check_model
from kconvert_qat.export.encode import Seen, check_values, encoded, help_gather
from kconvert_qat.export.patch import HELD, Exported, PatchWriter, check_room, last_export, remember
from kconvert_qat.export.planned import Export, plan_export, plan_of
from kconvert_qat.export.ranks import check_same, is_leader, is_sharded, together
from kconvert_qat.export.shards import write_shards

__all__ = ["Export", "export", "plan_export"]


def export(
    model: nn.Module,
    destination: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    for_transformers: bool = True,
    only_changed: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Plan:
    """Write the prepared `model` into directory `destination`, its experts on the grid that it was trained on.

    `source`, the checkpoint that training began with, lends its names of weights, its config.json and its side files, and where
    its experts are on the same grid (other than INT4) its encodings of everything; without it they come from the model, and the
    `tokenizer` is saved with them. Nothing is written where transformers could
    not load it, as for models whose experts it keeps fused; `for_transformers=False` is for engines that read experts one
    by one all the same. `advance` is called with the bytes written. Under FSDP2 every rank calls this; weights are gathered
    one by one, and the first rank writes; where one refuses, all do. Returns the plan that was carried out.

    With `only_changed` the directory gets a patch: the weights whose codes or values are others than in the last export of this
    model in this process, whole or patch, for `kconvert apply` to merge into a copy of that.
    """
    check_model(model)
    sharded = is_sharded(model)
    with together(sharded):
        advance = _check_options(destination, tokenizer, shard_size, advance)
    target = Path(destination)
    if only_changed:
        return _export_changes(model, source, target, shard_size, overwrite, advance)
    with together(sharded):
        task = plan_export(
            model, source=source, tokenizer=tokenizer, shard_size=shard_size, for_transformers=for_transformers
        )
        check_values(task)
        if is_leader():
            kconvert.check(task.plan, target, overwrite=overwrite)
    check_same(sharded, f"whole {Exported.of(task, {}).outline}")
    seen: Mapping[str, Seen] = {}
    with together(sharded):
        if is_leader():
            with Journal(target, task.plan, overwrite) as journal:
                seen = write_shards(task.plan, journal, encoded(task, {}), advance)
                finalize(task.plan, journal)
        else:
            help_gather(task)
    remember(model, Exported.of(task, seen))
    return task.plan


def _check_options(destination: object, tokenizer: Any, shard_size: object, advance: object) -> Callable[[int], None]:
    """KconvertError for what cannot be carried out; what to call with the bytes written."""
    address(destination)
    if type(shard_size) is not int or shard_size < 1:
        raise KconvertError(f"shard_size is {shard_size!r}, but it must be a number of bytes")
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise KconvertError(f"the tokenizer is {tokenizer!r}, which has no save_pretrained; give one of transformers")
    if advance is None:
        return lambda nbytes: None
    if not callable(advance):
        raise KconvertError(f"advance is {advance!r}, which cannot be called with the bytes written")
    return advance


def _export_changes(
    model: nn.Module,
    source: str | os.PathLike[str] | None,
    target: Path,
    shard_size: int,
    overwrite: bool,
    advance: Callable[[int], None],
) -> Plan:
    sharded = is_sharded(model)
    with together(sharded):
        task = plan_of(model, source)
        check_values(task)
        last, mine = last_export(model), Exported.of(task, {})
        if mine.outline != last.outline:
            raise KconvertError(
                "the model has other tensors, or another encoding, than in its last export, which no patch can follow; export "
                "it whole, or with the same options"
            )
        if is_leader():
            check_room(target, overwrite)
    check_same(sharded, f"patch {mine.outline}")
    plan = task.plan
    with together(sharded):
        if is_leader():
            writer = PatchWriter(target, min(shard_size, HELD), advance)
            mine = replace(mine, seen=writer.write(encoded(task, last.seen), last.seen))
            plan = writer.finish(last.id, task.plan, task.id)
        else:
            help_gather(task)
    remember(model, mine)
    return plan
