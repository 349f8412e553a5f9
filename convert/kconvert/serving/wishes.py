"""What a user wants of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kconvert.errors import KconvertError
from kconvert.serving.table import Engine

# Wish -> its option, and what an engine that can be asked for it has a flag for.
OPTIONS = {
    "gpus": ("--gpus", "gpus"),
    "context": ("--context", "context"),
    "gpu_experts": ("--gpu-experts", "gpu_experts"),
    "cores": ("--cores", "cores"),
    "numa": ("--numa", "numa"),
}


@dataclass(frozen=True, slots=True)
class Wishes:
    """None: what the engine does by itself.

    `gpu_memory` is that of each GPU in bytes, `gpu_experts` the number of experts of each layer that are on GPUs, `cores` and
    `numa` are what computes the others, `source` is the checkpoint that weights without their model were made from, `more` what
    the engine is told besides.
    """

    gpus: int | None = None
    gpu_memory: int | None = None
    context: int | None = None
    gpu_experts: int | None = None
    cores: int | None = None
    numa: int | None = None
    source: str | None = None
    more: Sequence[str] = ()

    def check(self, engine: Engine, wants_source: bool) -> None:
        """KconvertError for what this engine cannot be asked for."""
        idle = [
            option
            for wish, (option, flag) in OPTIONS.items()
            if getattr(self, wish) is not None and flag not in engine.flags
        ]
        if self.gpu_memory is not None and not engine.share:
            idle.append("--gpu-memory")
        if idle:
            raise KconvertError(f"{engine.title} cannot be asked for {' and '.join(idle)}; leave that out")
        if self.source is not None and not wants_source:
            raise KconvertError("--source is for AMX weights and others without the rest of their model; leave it out")
