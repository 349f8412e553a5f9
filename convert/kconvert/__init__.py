"""kconvert: converts, repacks and re-quantises checkpoints of mixture-of-experts language models.

The public API is five functions, `inspect`, `plan`, `convert`, `verify` and `open`, and what they take and return; of many
machines, `finalize` is the last act, and of a training `apply` takes over what changed:

    plan = kconvert.plan("Kimi-K2-Thinking", kconvert.Recipe("bf16"))
    kconvert.convert(plan, "Kimi-K2-Thinking-BF16")
    kconvert.verify("Kimi-K2-Thinking", "Kimi-K2-Thinking-BF16")
    with kconvert.open("Kimi-K2-Thinking") as weights:  # or without a copy on the disk: BF16 tensors by name
        weights["model.layers.1.mlp.experts.0.up_proj.weight"]

A source is a directory, a snapshot or repository in the Hub's cache, or a Hub id (`ORG/NAME`, `hf://ORG/NAME@REVISION`; a
directory of that name goes first). Sizes are in bytes. A weight is a matrix [out, in], whatever tensors spell it. Wrong usage
and bad input raise `KconvertError` with a message of one sentence, a check that failed its subclass `CheckFailed`.
Within `links_allowed()` the functions follow links that lead out of a checkpoint.

What a program names is imported when it names it: a command starts without what it does not need.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kconvert.errors import CheckFailed, KconvertError
from kconvert.version import __version__

if TYPE_CHECKING:
    from kconvert.chat.smoke import SmokeReport, smoke
    from kconvert.checkpoint.directory import links_allowed
    from kconvert.models.model import Model
    from kconvert.planning.plan import Plan
    from kconvert.proof.certificate import certify, check_certificate
    from kconvert.proof.verify import Report, verify
    from kconvert.run.disk import Needs
    from kconvert.run.state.finalize import Closed
    from kconvert.run.state.merge import Applied
    from kconvert.run.state.ranks import Rank
    from kconvert.run.trace import Trace
    from kconvert.targets.recipe import Recipe
    from kconvert.weights import Weights

__all__ = [
    "CheckFailed",
    "KconvertError",
    "Model",
    "Plan",
    "Recipe",
    "Report",
    "SmokeReport",
    "Weights",
    "__version__",
    "apply",
    "certify",
    "check_certificate",
    "convert",
    "finalize",
    "inspect",
    "links_allowed",
    "open",
    "plan",
    "smoke",
    "verify",
]

StrPath = str | os.PathLike[str]
HOMES = {
    "Model": "models.model",
    "Plan": "planning.plan",
    "Recipe": "targets.recipe",
    "Report": "proof.verify",
    "SmokeReport": "chat.smoke",
    "Weights": "weights",
    "certify": "proof.certificate",
    "check_certificate": "proof.certificate",
    "links_allowed": "checkpoint.directory",
    "smoke": "chat.smoke",
    "verify": "proof.verify",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What the public API has elsewhere."""
        if name not in HOMES:
            raise AttributeError(f"module 'kconvert' has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"kconvert.{HOMES[name]}"), name)
        return value


def inspect(source: StrPath, revision: str | None = None) -> Model:
    """What the checkpoint `source` is; reads config.json and the headers of its files, no tensor data.

    `Model.weights` are the matrices that an encoding may spell, each with name, role (`expert.gate`, `attention.o`, …), shape
    [rows, cols] = [out, in], format, tensors, and the numbers of its layer and expert where it has them; `Model.plain` are the
    tensors that are copied as they are, `Model.dropped` those that a conversion leaves behind. `revision` is a branch, tag
    or commit of the Hub.

    KconvertError when it is no checkpoint, when a header is not sound, and for the first tensor that belongs to no weight, is
    missing, or has another dtype or shape than its manifest and its encoding demand.
    """
    from kconvert.address import open_checkpoint
    from kconvert.models.model import understand

    with _collector_paused():
        return understand(open_checkpoint(source, revision))


def plan(source: StrPath, recipe: Recipe, revision: str | None = None) -> Plan:
    """What a conversion of `source` by `recipe` will write, byte for byte; reads what `inspect` reads.

    Every shard's name, header and size in bytes are in it, and for every output tensor the weight and the bytes that it is
    made of. It depends on headers and recipe alone: the same of both give the same plan, on any machine.

    KconvertError as `inspect`, and when the recipe does not fit: the source holds another encoding than `recipe.source`,
    nothing is left to convert, or a weight's columns do not divide into groups.
    """
    from kconvert.address import anywhere, open_checkpoint
    from kconvert.models.model import understand
    from kconvert.planning.plan import repeatable
    from kconvert.targets.planner import make_plan

    with _collector_paused():
        checkpoint = open_checkpoint(source, revision)
        made = make_plan(understand(checkpoint), recipe)
    return repeatable(made, plan, anywhere(source), recipe, checkpoint.commit or revision)


def open(source: StrPath, revision: str | None = None, *, threads: int | None = None) -> Weights:
    """The values of `source`, a tensor of torch for each name that a conversion to BF16 would write, decoded when asked for.

    See kconvert.Weights, which is a Mapping. Reads what `inspect` reads; tensor data when a tensor is asked for, from the
    Hub and object stores only that. `threads` decode one large tensor together (by default the cores).
    KconvertError as `inspect`, and when nobody can read the values of some weight.
    """
    from kconvert.address import open_checkpoint
    from kconvert.models.model import understand
    from kconvert.targets.planner import decoded
    from kconvert.weights import Weights

    with _collector_paused():
        checkpoint = open_checkpoint(source, revision)
        model = understand(checkpoint)
        return Weights(checkpoint, decoded(model), threads, model.layers)


def pinned(source: StrPath, destination: StrPath, revision: str | None = None) -> str | None:
    """The commit of the Hub that an earlier run into `destination` began with, if it read the same source; else `revision`."""
    from kconvert.run.delivery import Delivery
    from kconvert.run.state.heads import head_at, pinned_commit
    from kconvert.run.state.stored import head_in

    delivery = Delivery.to(destination)
    look = partial(head_at, delivery.directory) if delivery.store is None else partial(head_in, delivery.store)
    return pinned_commit(look, os.fspath(source), revision) or revision


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A large checkpoint is a million small objects that all stay; the collector would walk them over and over."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, as if they had been walked already
        if was_enabled:
            gc.enable()


def check(
    plan: Plan,
    destination: StrPath,
    *,
    overwrite: bool = False,
    push: str | None = None,
    disk_budget: int | None = None,
    worker: str | None = None,
    finalize_when_complete: bool = False,
    check_first: bool = False,
    engine: str = "threads",
    ray_address: str | None = None,
) -> Needs:
    """What a run of `plan` into `destination` needs, in bytes, and finds finished already; arguments as for `convert`.

    KconvertError when it cannot be carried out: paths that overlap, a full disk, a budget that is too small, another
    checkpoint or another plan's unfinished output in `destination`. Writes nothing.
    """
    from kconvert.cluster.ray import is_ray
    from kconvert.run import job
    from kconvert.run.delivery import Delivery

    terms = job.Terms(
        overwrite,
        disk_budget,
        _rank(worker),
        finalize_when_complete,
        check_first,
        driver=is_ray(engine, ray_address),
    )
    return job.check(plan, Delivery.to(destination, push), terms)


def convert(
    plan: Plan,
    destination: StrPath,
    *,
    threads: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
    found: Callable[[int], None] | None = None,
    push: str | None = None,
    disk_budget: int | None = None,
    worker: str | None = None,
    finalize_when_complete: bool = False,
    check_first: bool = False,
    trace: Trace | None = None,
    engine: str = "threads",
    ray_address: str | None = None,
    command: str = "kconvert.convert",
) -> dict[str, int]:
    """Carry out `plan` into `destination`, or finish an earlier run that was interrupted.

    `destination` is a directory, a Hub id or an object store's `s3://bucket/prefix`; `push` is a repository that gets the
    output of a directory, too, and `command` what reports and the model card say was typed. `disk_budget` bounds the bytes on
    the output's disk: source files from elsewhere are deleted as soon as nothing needs them, and shards once they are on the
    Hub or in the store, if they go there.
    `threads` are worker threads (by default the cores and six), `memory` bounds the buffers of all together in bytes (by
    default 256 MiB); neither changes a byte of the output. `overwrite` replaces the checkpoint in `destination`. `advance`
    is called from worker threads with the number of bytes written (of finished shards too), `found` once, at the beginning,
    with the bytes that an earlier run has finished. `trace` is told what the workers do when, see kconvert.run.trace.

    With `worker` this is one of many processes, on any machines that see SRC and DST, each of which writes its share of the
    shards: "I/N" is number I of N, from 0 on; "slurm", "torchrun" and "kubernetes" take both from what these launchers set,
    "auto" from whichever there is. Afterwards `finalize` closes `destination`, or with `finalize_when_complete` the last one.
    With the `engine` "ray" the workers of a Ray cluster are such processes, and this one starts them, starts again what a dead
    machine had, and closes `destination`; `threads` and `memory` are of each. `ray_address` is a cluster's, by default that
    at hand, or a new one of this machine.

    Values are looked at as they pass, and nothing is read twice for that; with `check_first` all scales and shapes of a local
    checkpoint are read before anything is written.

    Returns how many groups of which weights, by name, lost something where nothing was to be lost (exact INT4), in this run;
    and 1 for each scale of activations, by its tensor's name, that became 1 as the source's has no inverse.
    KconvertError as `check`, before anything is written; and while it runs, when a value cannot be converted (a scale that is
    not finite, a scale of zero over codes that are not), when the disk or the Hub fails, or the source changes. What is
    finished then stays, and the same call goes on from there.
    """
    from kconvert.cluster.ray import is_ray
    from kconvert.report.card import ModelCard
    from kconvert.run.delivery import Delivery
    from kconvert.run.engine import Limits
    from kconvert.run.job import Terms, prepared
    from kconvert.run.trace import Trace

    advance, found = advance or (lambda nbytes: None), found or (lambda nbytes: None)
    driver = is_ray(engine, ray_address)
    terms = Terms(overwrite, disk_budget, _rank(worker), finalize_when_complete, check_first, driver=driver)
    delivery, limits = Delivery.to(destination, push), (threads, memory)
    if terms.driver:
        from kconvert.cluster.conversion import convert_by_ray

        if trace is not None and trace.is_drawn:
            raise KconvertError("--trace shows the workers of one process; leave it out, or start ranks by --worker")
        return convert_by_ray(plan, delivery, terms, command, ModelCard, ray_address, limits, advance, found)
    if trace is not None and plan.source is not None and plan.source.directory is not None:
        trace.check_outside(plan.source.untouched)
    with prepared(plan, delivery, terms, command, ModelCard(plan, command)) as job:
        found(job.earlier)
        advance(job.earlier)
        inexact = job.run(Limits.choose(*limits), advance, trace or Trace())
        job.finish()
    return inexact


def finalize(destination: StrPath) -> Closed:
    """Close `destination`, a directory or a place in an object store, to which the ranks of a conversion have written all
    shards (`convert` with `worker`).

    Every shard is looked at: size, time (in a store: ETag) and header are those that it was planned and left with. Then side
    files, config.json and index are written, and all is as a run without ranks would have left it; SRC is not needed. Returns
    how many `shards` of how many bytes (`nbytes`) there are, and whether it was closed `before`.

    KconvertError when shards are missing, with the ranks that have to run again, and when `destination` is not that of ranks.
    """
    from pathlib import Path

    from kconvert.run.state.finalize import finalize_ranks
    from kconvert.run.state.stored import finalize_stored
    from kconvert.stores.urls import parse_store_url

    place = parse_store_url(os.fspath(destination))
    return finalize_ranks(Path(destination)) if place is None else finalize_stored(place)


def apply(destination: StrPath, patch: StrPath) -> Applied:
    """Merge the directory `patch`, which `kconvert_qat.export` wrote with `only_changed`, into `destination`, a copy of the
    export that it follows.

    Only the bytes that changed are written, in place. In between `destination` has no config.json and no index, so that nobody
    takes it for a checkpoint; after an interruption the same call goes on. Returns how many `tensors` of how many bytes
    (`nbytes`) were replaced, and whether that had been done `before`.

    KconvertError, and nothing is written, when the patch follows another export, is damaged or was not finished, and when a
    file of `destination` is linked from elsewhere.
    """
    from pathlib import Path

    from kconvert.address import address
    from kconvert.run.state.merge import apply_patch

    return apply_patch(Path(address(destination)), Path(address(patch)))


def _rank(worker: str | None) -> Rank | None:
    from kconvert.run.state.ranks import Rank

    return None if worker is None else Rank.parse(worker, os.environ)
