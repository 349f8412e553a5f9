"""What the user asks of quantisation-aware training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kconvert.errors import KconvertError
from kconvert.formats.conventions import CONVENTIONS, KIMI

CONFIG_NAME = "qat_config.json"  # beside the config.json of what was trained
GRADIENTS = ("straight-through", "clip")
LORA_MODES = ("merged", "unmerged")


@dataclass(frozen=True, slots=True)
class QATConfig:
    """The grid, where it is used, and how training meets it.

    `convention` and `group_size` are those of the INT4 checkpoint that will be shipped, see formats.conventions.
    `targets`: a matrix is quantised when one of them is its role (`expert`, or `expert.gate`, `expert.up`, `expert.down`) or
    a glob of its name in the checkpoint (`model.layers.1.*`).
    `start_step`: the first steps see the weights as they are.
    `gradient`: `straight-through`, or `clip`, which is zero where a code has to be clamped (never in kimi's convention).
    `lora`: `merged` quantises the sum of weight and adapter, which is then exported as one; `unmerged` the weight alone.
    `distillation` is the weight of the KL divergence from the teacher in the loss, 1 - distillation that of the labels'
    cross-entropy; `temperature` softens both distributions.
    """

    convention: str = KIMI.name
    group_size: int = 32
    targets: tuple[str, ...] = ("expert",)
    start_step: int = 0
    gradient: str = GRADIENTS[0]
    lora: str = LORA_MODES[0]
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        self._check(self.convention in CONVENTIONS, "convention", f"one of {', '.join(CONVENTIONS)}")
        self._check(_is_int(self.group_size) and self.group_size > 0, "group_size", "a multiple of 8, mostly 32")
        self._check(self.group_size % 8 == 0, "group_size", "a multiple of 8, mostly 32")
        sound = bool(self.targets) and all(isinstance(target, str) and target for target in self.targets)
        self._check(sound, "targets", "a list of roles or globs")
        self._check(_is_int(self.start_step) and self.start_step >= 0, "start_step", "a number of steps")
        self._check(self.gradient in GRADIENTS, "gradient", f"one of {', '.join(GRADIENTS)}")
        self._check(self.lora in LORA_MODES, "lora", f"one of {', '.join(LORA_MODES)}")
        self._check(_is_number(self.distillation) and 0 <= self.distillation <= 1, "distillation", "between 0 and 1")
        self._check(_is_number(self.temperature) and self.temperature > 0, "temperature", "above 0")

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
        except ValueError as error:
            raise KconvertError(f"QATConfig: its text is not valid JSON ({error})") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(table, Mapping) or not table.keys() <= known:
            raise KconvertError(f"QATConfig: its JSON must be an object with the keys {', '.join(sorted(known))}")
        return cls(**table)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
