"""The plan of an output: what every byte of it comes from, and the hash by which that is known. Reads no tensor data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

from kconvert.checkpoint.source import Checkpoint
from kconvert.planning.containers import Container, Shard
from kconvert.planning.steps import Step, Transcode
from kconvert.planning.texts import Text, digest_of
from kconvert.version import __version__


@dataclass(frozen=True)
class Plan:
    """What will be done. `texts` are the small files written last, in this order, config.json and the index at its end.

    `recipe` says in words what was asked for, `facts` what a user wants to know; a synthetic sample has no `source`.
    `again` makes the same plan elsewhere, and can be pickled; who has made a plan by other means than these may leave it out.
    """

    recipe: str
    source: Checkpoint | None
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    texts: Mapping[str, Text]
    facts: Mapping[str, Any]
    again: Callable[[], Plan] | None = field(default=None, compare=False, repr=False)

    @property
    def side_files(self) -> Mapping[str, int]:
        return self.source.side_files if self.source else {}

    @cached_property
    def output_bytes(self) -> int:
        """Everything that will lie in DST, in bytes."""
        texts = sum(map(len, self.texts.values()))
        return sum(shard.nbytes for shard in self.shards) + sum(self.side_files.values()) + texts

    @cached_property
    def hash(self) -> str:
        """Stable over runs and machines: equal plans write equal bytes from equal sources."""
        digest = hashlib.sha256(f"{__version__} {self.recipe}".encode())
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.nbytes}".encode())
            digest.update(shard.digest)
        # By identity: formats that are equal may still make codes by different rules, which belong to the plan.
        spelled: dict[tuple[int, int], str] = {}
        quoted = cache(repr)  # a file's name, which many steps read from
        for step in self.steps:
            formats = "[]"
            if isinstance(step, Transcode):
                pair = id(step.source), id(step.target)
                formats = spelled.get(pair) or spelled.setdefault(pair, str([repr(step.source), repr(step.target)]))
            reads = ", ".join([f"({quoted(place.file)}, {place.start})" for place in step.reads])
            digest.update(f"{step.name} {formats} [{reads}]".encode())
            if isinstance(step, Transcode) and step.mates:
                digest.update(repr([mate.name for mate in step.mates]).encode())
        for name, text in self.texts.items():
            digest.update(name.encode())
            digest.update(digest_of(text))
        digest.update(repr(sorted(self.side_files.items())).encode())
        return digest.hexdigest()

    @cached_property
    def stamp(self) -> str:
        """Changes when the source's files do."""
        files = self.source.files if self.source else {}
        return hashlib.sha256(repr([(name, stat.stamp) for name, stat in files.items()]).encode()).hexdigest()

    def files_of(self, shard: str) -> list[str]:
        """Those of the source that the shard is made of."""
        steps = self.only({shard}).steps
        return sorted({place.file for step in steps for place in step.origins})

    def stamp_of(self, shard: str) -> str:
        """Changes when those of the source's files do that the shard is made of."""
        stamps = [(file, self.source.files[file].stamp) for file in self.files_of(shard)] if self.source else []
        return hashlib.sha256(repr(stamps).encode()).hexdigest()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of the shards, in bytes."""
        return tuple(shard.nbytes for shard in self.shards)

    def only(self, files: Collection[str]) -> Plan:
        """The same plan with those steps alone that write to `files`; its hash is that of the whole."""
        spans = (range(*self._spans[file]) for file in files if file in self._spans)
        numbers = sorted(set().union(*spans))
        steps = (self.steps[number] for number in numbers)
        part = replace(self, steps=tuple(step for step in steps if any(place.file in files for place in step.writes)))
        vars(part).update(hash=self.hash, stamp=self.stamp)
        return part

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        """Of each file the first step that writes to it, and the one after the last."""
        spans: dict[str, tuple[int, int]] = {}
        for number, step in enumerate(self.steps):
            for place in step.writes:
                spans[place.file] = spans.get(place.file, (number, 0))[0], number + 1
        return spans

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON: what `--dry-run --json` prints."""
        return {
            "plan": self.hash,
            **self.facts,
            "output_bytes": self.output_bytes,
            "shards": [{"name": s.name, "bytes": s.nbytes, "tensors": len(s.tensors)} for s in self.shards],
            "side_files": list(self.side_files),
        }


def repeatable(plan: Plan, make: Callable[..., Plan], *arguments: Any) -> Plan:
    """`plan`, which `make` made of these arguments and will make of them elsewhere."""
    return replace(plan, again=partial(make, *arguments))


@dataclass(frozen=True)
class Output:
    """What a target makes of a model and a recipe: what is written of which weights, into which container.

    `drafts` are steps without places, in the order of the output, which are taken once; `texts` are small files beside
    config.json, whose content is `config`. `parameters` is the size of the model, `facts` make those of the plan from its
    steps. The rest is the plan's own, see Plan.
    """

    recipe: str
    source: Checkpoint | None
    drafts: Iterable[Step]
    container: Container
    config: Mapping[str, Any]
    parameters: int
    facts: Callable[[Sequence[Step]], Mapping[str, Any]]
    texts: Mapping[str, bytes] = field(default_factory=dict)

    def plan(self) -> Plan:
        """With a place for every byte; KconvertError where there is none."""
        steps, shards = self.container.place(self.drafts)
        texts: dict[str, Text] = {**self.texts, **self.container.texts(self.config, shards, self.parameters)}
        return Plan(self.recipe, self.source, steps, shards, texts, self.facts(steps))
