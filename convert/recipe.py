"""What the user asked for: the target encoding and what decides the output's bytes. Nothing about how it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kconvert.checkpoint.config import without_quantization
from kconvert.errors import KconvertError
from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.model import Model, Weight, format_counts

TARGETS = ("bf16",)
DEFAULT_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Recipe:
    """`to` is one of TARGETS. `source`, when given, is what the quantised weights must be (`int4`); else any will do."""

    to: str
    source: str | None = None
    shard_size: int = DEFAULT_SHARD_SIZE
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise KconvertError(f"there is no target {self.to!r}; there are {', '.join(TARGETS)}")
        if self.shard_size <= 0:
            raise KconvertError(f"a shard size of {self.shard_size} bytes is not possible; the default is 5GB")

    def check_source(self, model: Model) -> None:
        """KconvertError when the checkpoint is not what the command's name says."""
        quantised = [weight for weight in model.weights if not isinstance(weight.format, Dense)]
        if not quantised:
            raise KconvertError(f"{model.checkpoint.root} holds no quantised weights; there is nothing to convert")
        for weight in quantised:
            if self.source and not weight.format.label.startswith(self.source):
                have = ", ".join(sorted(format_counts(quantised)))
                raise KconvertError(
                    f"{weight.tensors[0]} is {weight.format.label}, not {self.source} (the checkpoint holds {have}); "
                    f"use `kconvert convert --to {self.to}`"
                )

    def target(self, weight: Weight) -> Format | None:
        """The encoding that this weight gets; None: its tensors are copied byte for byte."""
        return None if isinstance(weight.format, Dense) else Dense("BF16")

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the output."""
        return without_quantization(config)
