"""Packing, splitting and reading AMX weights, for the tests of `repack-amx`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from click.testing import CliRunner, Result

import kconvert
from kconvert import convert
from kconvert.cli import main
from kconvert.models.amx import open_amx
from kconvert.targets.amx import AmxRecipe, plan_repack, plan_resplit

HIDDEN, INTERMEDIATE = 256, 512
Tree = Callable[[Path], dict[str, bytes]]


def repack(source: Path, destination: Path, method: str, numa: int, **options: Any) -> Path:
    run = {name: options.pop(name) for name in ("threads", "memory", "advance", "overwrite") if name in options}
    convert(plan_repack(kconvert.inspect(source), AmxRecipe(method, numa, **options)), destination, **run)
    return destination


def resplit(source: Path, destination: Path, numa: int, form: str = "safetensors", **options: Any) -> Path:
    convert(plan_resplit(open_amx(source), numa, form, **options), destination)
    return destination


def load(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the directory, by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(root.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
