"""A whole export into the shards of its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kconvert.planning.plan import Plan
from kconvert.run.state.journal import Journal
from kconvert.run.writer import ShardWriter
from kconvert_qat.export.encode import Encoded, Seen


def write_shards(
    plan: Plan, journal: Journal, weights: Iterable[Encoded], advance: Callable[[int], None]
) -> dict[str, Seen]:
    """Every shard, in order; returns what each weight was."""
    shards = {shard.name: shard for shard in plan.shards}
    writers: dict[str, ShardWriter] = {}
    seen: dict[str, Seen] = {}
    try:
        for weight in weights:
            seen[weight.step.name] = weight.seen
            for spot, data in zip(weight.step.writes, weight.parts, strict=True):
                if spot.file not in writers:
                    shard, path = shards[spot.file], journal.destination / spot.file
                    writers[spot.file] = ShardWriter(path, journal.partial(spot.file), shard.header, shard.nbytes)
                if len(data) and writers[spot.file].write(data.data, spot.start):
                    writers.pop(spot.file).commit()
                    journal.record(spot.file)
                advance(len(data))
    finally:
        for writer in writers.values():
            writer.abandon()
    return seen
