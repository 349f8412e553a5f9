"""Whether an export can be read again, found out before a byte of it is written.

transformers keeps the experts of some models fused in its checkpoints, and has no INT4 for them there: under other names it
reads none of them and gives the model random ones, with a warning at most. Which models these are is asked of its own
loader, with the shapes of the export on the meta device; kconvert is asked to understand the export from its headers.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from packaging.version import Version
from torch import nn

from kconvert.checkpoint.listing import CONFIG_NAME
from kconvert.checkpoint.safetensors import Described, Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import KconvertError
from kconvert.formats.dtypes import tensor_bytes
from kconvert.formats.stacks import MxStack
from kconvert.models.model import understand
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Transcode
from kconvert_qat.names import base_model, plain_class

Shapes: TypeAlias = dict[str, torch.Tensor]

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
ADVICE = (
    "save_pretrained keeps what was trained, and with for_transformers=False the export is written for engines that read "
    "experts one by one"
)


def check_readable(model: nn.Module, plan: Plan, for_transformers: bool) -> None:
    """KconvertError when what `plan` writes could not be read by kconvert, or not by transformers into such a model."""
    if for_transformers and hasattr(base_model(model), "_from_config") and _can_be_asked():
        _check_transformers(model, plan)
    try:
        understand(_as_checkpoint(plan))
    except KconvertError as error:
        # What a reader of such a checkpoint is advised to do, and where it lies, is not for its writer.
        fault = str(error).partition("; ")[0].removeprefix(f"{Path()}: ")
        raise KconvertError(f"kconvert could not read the export, so it is not written: {fault}") from None


def _can_be_asked() -> bool:
    """compressed-tensors before 0.20, the last for Python 3.10, loads nothing without values beside a process group."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return alone or Version(version("compressed-tensors")) >= Version("0.20")


def _as_checkpoint(plan: Plan) -> Checkpoint:
    """The export as its headers will describe it."""
    tensors = {
        name: Tensor(name, dtype, shape, place.file, place.start, tensor_bytes(dtype, shape))
        for step in plan.steps
        for (name, dtype, shape), place in zip(step.outputs, step.writes, strict=True)
    }
    return Checkpoint(Path(), json.loads(bytes(plan.texts[CONFIG_NAME])), tensors, {}, {}, ())


def _check_transformers(model: nn.Module, plan: Plan) -> None:
    name, grid = plain_class(base_model(model)).__name__, str(plan.facts["to"]).upper()
    quantization = json.loads(bytes(plan.texts[CONFIG_NAME]))["quantization_config"]
    quantised = _load(model, _shapes(plan), {**quantization, "dequantize": True})
    loaded = quantised or _load(model, _shapes(plan, decoded=True))
    if loaded is None:
        raise KconvertError(f"transformers fails to load a {name} from what would be written; {ADVICE}")
    if random := sorted(loaded["missing_keys"]):
        raise KconvertError(
            f"transformers has no {grid} for {random[0]!r} of a {name}, which it keeps fused, and would load random values; "
            f"{ADVICE}"
        )
    if unread := sorted(loaded["unexpected_keys"]):
        raise KconvertError(f"transformers would not read {unread[0]!r} into a {name}; {ADVICE}")
    if quantised is None:
        logging.getLogger(__name__).warning(
            "transformers %s fails to load the %s checkpoint of this %s, with an error; `kconvert convert --to bf16` makes one "
            "of it that it loads",
            version("transformers"),
            grid,
            name,
        )


def _shapes(plan: Plan, decoded: bool = False) -> Shapes:
    """The tensors that `plan` writes, or with its codes `decoded`, without their values."""
    shapes: Shapes = {}
    for step in plan.steps:
        outputs = step.outputs
        if decoded and isinstance(step, Transcode):
            outputs = [_decoded(step)]
        shapes |= {name: torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta") for name, dtype, shape in outputs}
    return shapes


def _decoded(step: Transcode) -> Described:
    """What the weight is as BF16; the matrices of a stack lie in it as gpt-oss has them."""
    if isinstance(step.target, MxStack):
        count = step.target.stack
        return step.name, "BF16", (count, step.cols, step.rows // count)
    return f"{step.name}.weight", "BF16", (step.rows, step.cols)


def _load(model: nn.Module, shapes: Shapes, quantization: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What from_pretrained says of loading such tensors into a model of this class; None when it fails, which is not silent."""
    base = base_model(model)
    config = copy.deepcopy(base.config)
    if quantization:
        config.quantization_config = quantization
    loader: Any = plain_class(base)
    with silence(), suppress(RuntimeError):
        _, loaded = loader.from_pretrained(
            None, config=config, state_dict=shapes, dtype=torch.bfloat16, device_map="meta", output_loading_info=True
        )
        return dict(loaded)
    return None


@contextmanager
def silence() -> Iterator[None]:
    """transformers' reports and progress bars are for what is really loaded."""
    import transformers

    theirs: Any = transformers.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
