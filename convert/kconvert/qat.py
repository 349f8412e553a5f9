"""Quantisation-aware training went to `kconvert_qat`; its names can still be had from here, with a warning."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    warnings.warn(f"kconvert.qat is kconvert_qat now: import {name} from there", DeprecationWarning, stacklevel=2)
    return getattr(import_module("kconvert_qat"), name)
