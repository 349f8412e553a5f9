"""Scales of activations that somebody has measured: they go from one dialect's NVFP4 to the other's, as their inverses.

ModelOpt's engines want one beside each weight. compressed-tensors' quantise activations where a config group says so, for all
of its weights: so these go there together, or none of them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kconvert.checkpoint.safetensors import Tensor
from kconvert.errors import counted
from kconvert.formats import Format
from kconvert.formats.nvfp4 import INPUTS, Nvfp4, with_measured
from kconvert.planning.steps import Step, Transcode

if TYPE_CHECKING:
    from kconvert.models.model import Weight
    from kconvert.targets.base import Target


def all_measured(weights: Iterable[Weight], target: Target) -> bool:
    """Whether weights become compressed-tensors' NVFP4, and each has a scale of activations beside it."""
    found = False
    for weight in weights:
        choice = target.choice(weight)
        if not isinstance(choice, Nvfp4) or choice.multiplies or target.leaves(weight):
            continue
        if _scale(weight) is None:
            return False
        found = True
    return found


def told(encoding: Format, activations: bool) -> Format:
    """The encoding as config.json is to declare it, with `activations` quantised or not."""
    if not isinstance(encoding, Nvfp4) or encoding.multiplies:
        return encoding
    return replace(encoding, inputs=activations)


def measured(weight: Weight, encoding: Format, activations: bool) -> Tensor | None:
    """The scale of activations whose inverse the encoding has beside the weight's codes."""
    source = weight.format
    if not weight.companions or not isinstance(source, Nvfp4) or not isinstance(encoding, Nvfp4):
        return None
    if source.multiplies == encoding.multiplies or not (encoding.inputs if encoding.multiplies else activations):
        return None
    return _scale(weight)


def _scale(weight: Weight) -> Tensor | None:
    if not weight.companions or not isinstance(weight.format, Nvfp4):
        return None
    name = f"{weight.name}.{INPUTS[weight.format.multiplies]}"
    return next((t for t in weight.companions if t.name == name and (t.dtype, t.nbytes) == ("F32", 4)), None)


def with_inputs(weight: Weight, encoding: Format, activations: bool) -> tuple[Format, tuple[Tensor, ...], Format]:
    """What spells the weight now, its tensors, and its encoding; all with that scale where there is one."""
    source, found = weight.format, measured(weight, encoding, activations)
    if found is None or not isinstance(source, Nvfp4) or not isinstance(encoding, Nvfp4):
        return source, weight.tensors, encoding
    source, encoding = with_measured(source, encoding)
    return source, (*weight.tensors[:3], found, *weight.tensors[3:]), encoding


def notes(steps: Sequence[Step]) -> Iterator[str]:
    targets = [step.target for step in steps if isinstance(step, Transcode)]
    made = [target.multiplies for target in targets if isinstance(target, Nvfp4) and target.measured]
    if made:
        yield (
            f"{INPUTS[made[0]]} of {counted(len(made), 'weight')} is 1 / {INPUTS[not made[0]]} in F32, of which the inverse is "
            "another number for one in six; or 1 where that is none, as beside an expert that no token reached"
        )
