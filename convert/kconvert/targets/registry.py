"""The kinds of output there are; a new one is its file and its line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.targets import hf
from kconvert.targets.base import Targets
from kconvert.targets.gguf.architectures import TARGETS as GGUF

if TYPE_CHECKING:
    from kconvert.models.manifest import Manifest

TARGETS: Targets = {
    **hf.TARGETS,
    **GGUF,
}
# Those for models that call the parts of a weight as DeepSeek-V4 does, in the place of what has the same name above.
DEEPSEEK_V4: Targets = {
    **hf.DEEPSEEK_V4,
}


def targets_for(manifest: Manifest) -> Targets:
    """The outputs that a model with this manifest can have."""
    return {**TARGETS, **DEEPSEEK_V4} if hf.speaks_deepseek_v4(manifest) else TARGETS


def layouts_of(to: str) -> list[str]:
    """Every layout that follows `--to` this, for some model; none where there is no choice."""
    return [*dict.fromkeys(layout for targets in (TARGETS, DEEPSEEK_V4) for layout in targets.get(to, ()) if layout)]
