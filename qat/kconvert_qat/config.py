"""What the user asks of quantisation-aware training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kconvert.errors import KconvertError
from kconvert_qat.grids.table import GRIDS, Grid

CONFIG_NAME = "qat_config.json"  # beside the config.json of what was trained
GRADIENTS = ("straight-through", "clip")
LORA_MODES = ("merged", "unmerged")
BACKWARD = "backward"
KEPT = (BACKWARD, "served", "codes", "nothing")


@dataclass(frozen=True, slots=True)
class QATConfig:
    """The grid, where it is used, and how training meets it.

    `grid`, `convention` and `group_size` are those of the checkpoint that will be shipped, see grids; by default the grid's own
    convention and size.
    `targets`: a matrix is quantised when one of them is its role (`expert`, or `expert.gate`, `expert.up`, `expert.down`) or
    a glob of its name in the checkpoint (`model.layers.1.*`).
    `start_step`: the first steps see the weights as they are.
    `gradient`: `straight-through`, or for INT4 `clip`, zero where a code has to be clamped (never in kimi's convention).
    `lora`: `merged` quantises the sum of weight and adapter, which is then exported as one; `unmerged` the weight alone.
    `distillation` is the weight of the KL divergence from the teacher in the loss, 1 - distillation that of the labels'
    cross-entropy; `temperature` softens both distributions.
    `keep`: what a weight is served as is computed once for each of its versions and kept: by default what the `backward` pass
    holds anyway, for the micro-batches of a step; all that is `served`, a copy of the experts, also in an evaluation and for
    gradient checkpointing; its `codes`, less than a third of that in BF16, decoded at every forward; or `nothing`.
    """

    convention: str = ""
    group_size: int = 0
    targets: tuple[str, ...] = ("expert",)
    start_step: int = 0
    gradient: str = GRADIENTS[0]
    lora: str = LORA_MODES[0]
    distillation: float = 0.0
    temperature: float = 1.0
    grid: str = "int4"
    keep: str = KEPT[0]

    def __post_init__(self) -> None:
        self._check(isinstance(self.grid, str) and self.grid in GRIDS, "grid", f"one of {', '.join(GRIDS)}")
        if self.convention in ("", None):
            object.__setattr__(self, "convention", self.spec.conventions[0])
        if self.group_size is None or (_is_int(self.group_size) and self.group_size == 0):
            object.__setattr__(self, "group_size", self.spec.size)
        self._check(
            self.convention in self.spec.conventions, "convention", f"one of {', '.join(self.spec.conventions)}"
        )
        sizes = "a multiple of 8, mostly 32" if self.spec.any_size else f"{self.spec.size}, as {self.grid} has no other"
        self._check(_is_int(self.group_size) and self.group_size > 0, "group_size", sizes)
        sound = self.group_size % 8 == 0 if self.spec.any_size else self.group_size == self.spec.size
        self._check(sound, "group_size", sizes)
        sound = isinstance(self.targets, (list, tuple)) and bool(self.targets)
        sound = sound and all(isinstance(target, str) and target for target in self.targets)
        self._check(sound, "targets", "a list of roles or globs")
        object.__setattr__(self, "targets", tuple(self.targets))
        self._check(_is_int(self.start_step) and self.start_step >= 0, "start_step", "a number of steps")
        self._check(self.gradient in GRADIENTS, "gradient", f"one of {', '.join(GRADIENTS)}")
        self._check(self.gradient == GRADIENTS[0] or self.grid == "int4", "gradient", f"{GRADIENTS[0]} for {self.grid}")
        self._check(self.keep in KEPT, "keep", f"one of {', '.join(KEPT)}")
        self._check(self.lora in LORA_MODES, "lora", f"one of {', '.join(LORA_MODES)}")
        self._check(_is_number(self.distillation) and 0 <= self.distillation <= 1, "distillation", "between 0 and 1")
        self._check(_is_number(self.temperature) and self.temperature > 0, "temperature", "above 0")

    @property
    def spec(self) -> Grid:
        return GRIDS[self.grid]

    @property
    def label(self) -> str:
        """What people call it: `mxfp4`, `int4 kimi group 32`."""
        convention = f" {self.convention}" if len(self.spec.conventions) > 1 else ""
        return f"{self.grid}{convention}" + (f" group {self.group_size}" if self.spec.any_size else "")

    def _check(self, sound: bool, field: str, allowed: str) -> None:
        if not sound:
            raise KconvertError(f"QATConfig: {field} is {getattr(self, field)!r}, but it must be {allowed}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> QATConfig:
        """KconvertError when `text` is not what to_json wrote."""
        try:
            table = json.loads(text)
        except (TypeError, ValueError) as error:
            raise KconvertError(f"QATConfig: its text is not valid JSON ({error})") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(table, Mapping) or not table.keys() <= known:
            raise KconvertError(f"QATConfig: its JSON must be an object with the keys {', '.join(sorted(known))}")
        return cls(**table)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
