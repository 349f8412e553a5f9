"""Scales of activations that somebody has measured: they go from compressed-tensors' NVFP4 to ModelOpt's, as their inverses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kconvert.checkpoint.safetensors import Tensor
from kconvert.errors import counted
from kconvert.formats import Format
from kconvert.formats.nvfp4 import INPUTS, Nvfp4, with_measured
from kconvert.planning.steps import Step, Transcode

if TYPE_CHECKING:
    from kconvert.models.model import Weight


def measured(weight: Weight, encoding: Format) -> Tensor | None:
    """The scale of activations whose inverse the encoding has beside the weight's codes."""
    source = weight.format
    if not weight.companions or not isinstance(source, Nvfp4) or not isinstance(encoding, Nvfp4):
        return None
    if source.multiplies or not encoding.inputs:
        return None
    name = f"{weight.name}.{INPUTS[False]}"
    return next((t for t in weight.companions if t.name == name and (t.dtype, t.nbytes) == ("F32", 4)), None)


def with_inputs(weight: Weight, encoding: Format) -> tuple[Format, tuple[Tensor, ...], Format]:
    """What spells the weight now, its tensors, and its encoding; all with that scale where there is one."""
    source, found = weight.format, measured(weight, encoding)
    if found is None or not isinstance(source, Nvfp4) or not isinstance(encoding, Nvfp4):
        return source, weight.tensors, encoding
    source, encoding = with_measured(source, encoding)
    return source, (*weight.tensors[:3], found, *weight.tensors[3:]), encoding


def notes(steps: Sequence[Step]) -> Iterator[str]:
    targets = (step.target for step in steps if isinstance(step, Transcode))
    if count := sum(isinstance(target, Nvfp4) and target.measured for target in targets):
        yield (
            f"input_scale of {counted(count, 'weight')} is 1 / input_global_scale in F32, of which the inverse is another "
            "number for one in six"
        )
