"""The kinds of output there are; a new one is its file and its line here."""

from __future__ import annotations

from kconvert.targets import hf
from kconvert.targets.base import Targets

TARGETS: Targets = {
    **hf.TARGETS,
}
