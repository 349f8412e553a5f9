"""The encodings of the checkpoint that training began with, in which an export goes back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kconvert.checkpoint.source import Checkpoint
from kconvert.formats import Format
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.models.model import understand
from kconvert_qat.config import QATConfig


def native_formats(source: Checkpoint, matrices: Collection[str], config: QATConfig) -> dict[str, Format]:
    """How the source spells each weight that it has quantised, with codes found again where there are any.

    None of them where it has one of the `matrices` in another encoding than the grid's, or if the grid is INT4, whose exports
    have one spelling.
    """
    if config.grid == "int4":
        return {}
    found = {weight.name: weight.format for weight in understand(source).weights if weight.format.quantised}
    if not all(name in found and is_on_grid(found[name], config) for name in matrices):
        return {}
    return {name: _exact(format) for name, format in found.items()}


def is_on_grid(format: Format, config: QATConfig) -> bool:
    """Whether the format has the grid's values, whatever its tensors are called."""
    own = config.spec.format(config.group_size, config.convention)
    if isinstance(own, Fp8):
        return isinstance(format, Fp8) and (format.strategy, format.block, format.powers) == (
            own.strategy,
            own.block,
            own.powers,
        )
    if isinstance(own, Mx):
        return isinstance(format, Mx) and format.bits == own.bits
    return isinstance(format, Nvfp4) if isinstance(own, Nvfp4) else format == own


def _exact(format: Format) -> Format:
    """Zero points that mean nothing are left out."""
    if isinstance(format, Fp8):
        return replace(format, exact=format.powers, unused=())
    return replace(format, exact=True, unused=()) if isinstance(format, Mx | Nvfp4) else format
