"""Small members of every family: a config.json, and a checkpoint in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sizes import SIZES

from kconvert import convert, formats
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects import without_quantization
from kconvert.formats import parts_of
from kconvert.formats.dense import Dense
from kconvert.models.catalogue import load_manifest
from kconvert.models.manifest import Manifest
from kconvert.targets.sample import SampleRecipe, plan_synthetic

SMALL = {**SIZES, "layers": 4}


def small_sizes(manifest: Manifest) -> dict[str, int]:
    return {symbol: size for symbol, size in SMALL.items() if symbol in manifest.dims}


@pytest.fixture(scope="session")
def small_config() -> Callable[..., dict[str, Any]]:
    """`small_config(name, **changes)` is the config.json of a small unquantised member of a family."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        manifest = load_manifest(name)
        config = {**without_quantization(manifest.resize(manifest.config, small_sizes(manifest))), **changes}
        return {key: value for key, value in config.items() if value is not None}

    return make


@pytest.fixture(scope="session")
def tensors_of() -> Callable[..., dict[str, Tensor]]:
    """`tensors_of(name, config)` is every tensor of such a model by name, none of them quantised."""

    def make(name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = {}
        for module, match in load_manifest(name).bind(config).expected():
            whole, dtype, shape = module, match.rule.dtype, match.shape
            if dtype is None:
                (part,) = Dense("BF16", None, shape[1] if match.stack else None).parts(*match.matrix)
                whole, dtype, shape = part.tensor_of(module), part.dtype, part.shape
            tensors[whole] = Tensor(whole, dtype, shape, "model.safetensors", 0, 0)
        return tensors

    return make


@pytest.fixture(scope="session")
def checkpoint_of() -> Callable[..., Checkpoint]:
    """`checkpoint_of(config, tensors)` is a checkpoint whose headers say so; it has no data."""

    def make(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
        return Checkpoint(Path("checkpoint"), config, tensors, {}, {}, ())

    return make


@pytest.fixture(scope="session")
def small_sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`small_sample(name)` is a small synthetic checkpoint of a family, as published; look, do not touch."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            manifest = load_manifest(name)
            root = tmp_path_factory.mktemp("samples") / name
            convert(plan_synthetic(SampleRecipe(name, small_sizes(manifest), shard_size=2_000_000)), root)
            made[name] = root
        return made[name]

    return make


@pytest.fixture(scope="session")
def full_tensors() -> Callable[[str], dict[str, Tensor]]:
    """`full_tensors(name)` is every tensor of the published model, in its own encoding."""

    def make(name: str) -> dict[str, Tensor]:
        manifest = load_manifest(name)
        quantization = manifest.quantization(manifest.config)
        tensors: dict[str, Tensor] = {}
        for module, match in manifest.bind(manifest.config).expected():
            if match.rule.dtype is not None:
                tensors[module] = Tensor(module, match.rule.dtype, match.shape, "model.safetensors", 0, 0)
                continue
            scheme = quantization.scheme_for(module.removeprefix(manifest.prefix))
            format = manifest.spell(formats.from_scheme(scheme) if scheme else Dense("BF16"))
            for part in parts_of(format, *match.shape):
                whole = f"{module}.{part.suffix}"
                tensors[whole] = Tensor(whole, part.dtype, part.shape, "model.safetensors", 0, part.nbytes)
        return tensors

    return make
