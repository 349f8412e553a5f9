"""A small Kimi-K2-shaped checkpoint in INT4, BF16 and AMXINT4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from amx_packing import INTERMEDIATE, repack

import kconvert
from kconvert import Recipe, convert


@pytest.fixture(scope="module")
def source(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kimi-K2-shaped INT4 checkpoint whose experts split for 1, 2 and 4 NUMA nodes."""
    return sample(tmp_path_factory.mktemp("repack") / "tiny", moe_intermediate=INTERMEDIATE, experts=3)


@pytest.fixture(scope="module")
def dense(source: Path) -> Path:
    """`source` in BF16."""
    root = source.parent / "dense"
    convert(kconvert.plan(source, Recipe("bf16")), root)
    return root


@pytest.fixture(scope="module")
def two(source: Path) -> Path:
    """`source` as AMXINT4 for two NUMA nodes."""
    return repack(source, source.parent / "two", "AMXINT4", 2)
