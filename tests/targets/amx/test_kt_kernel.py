"""KTransformers' own loader and kernels on directories that `repack-amx` wrote; where kt-kernel runs, see amx_oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import amx_oracle
import numpy as np
import pytest
import torch

import kconvert
from kconvert import convert
from kconvert.models.amx import open_amx
from kconvert.proof.parity.oracle import independent_values
from kconvert.targets.amx import AmxRecipe, plan_repack, plan_resplit

HIDDEN, INTERMEDIATE, EXPERTS, LAYER = 256, 512, 3, 1

pytestmark = pytest.mark.skipif(amx_oracle.missing() is not None, reason=str(amx_oracle.missing()))


@pytest.fixture(scope="module")
def source(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tmp_path_factory.mktemp("kt") / "source", moe_intermediate=INTERMEDIATE, experts=EXPERTS)


def values(source: Path) -> dict[tuple[str, int], torch.Tensor]:
    """The experts' weights of one layer, by projection and expert."""
    model = kconvert.inspect(source)
    with model.checkpoint.reader() as reader:
        return {
            (weight.role.removeprefix("expert."), weight.expert): independent_values(weight, reader, 0, weight.rows)
            for weight in model.weights
            if weight.role.startswith("expert.") and weight.layer == LAYER and weight.expert is not None
        }


@pytest.mark.parametrize("numa", [1, 2, 4])
@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_kt_kernel_packs_the_same_files(source: Path, tmp_path: Path, method: str, numa: int) -> None:
    found = values(source)
    stacks = (torch.stack([found[name, expert] for expert in range(EXPERTS)]) for name in ("gate", "up", "down"))
    theirs = amx_oracle.pack(tmp_path / "theirs", method, numa, *stacks)
    convert(plan_repack(kconvert.inspect(source), AmxRecipe(method, numa, "amax", "kt")), tmp_path / "ours")
    model = open_amx(tmp_path / "ours")
    with model.checkpoint.reader() as reader:
        for name, data in theirs.items():
            tensor = model.checkpoint.tensors[name.replace("blk.0.", f"blk.{LAYER}.")]
            assert reader.read(tensor.file, tensor.start, tensor.nbytes) == data.tobytes(), name


def moe(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros(tokens.shape)
    for token, x in enumerate(tokens.float()):
        for expert, share in zip(ids[token].tolist(), shares[token], strict=True):
            inner = torch.nn.functional.silu(weights[f"gate{expert}"] @ x) * (weights[f"up{expert}"] @ x)
            output[token] += share * (weights[f"down{expert}"] @ inner)
    return output


def dequantised(root: Path, numa: int) -> dict[str, torch.Tensor]:
    """The experts of one layer by the closed form of kt-kernel's layout."""
    model = open_amx(root)
    weights = {}
    with model.checkpoint.reader() as reader:
        for weight in (weight for weight in model.weights if weight.layer == LAYER):
            data = [
                np.frombuffer(reader.read(tensor.file, tensor.start, tensor.nbytes), np.uint8)
                for tensor in weight.tensors
            ]
            by_rows = not weight.role.endswith("down")
            shape = (weight.rows // numa, weight.cols) if by_rows else (weight.rows, weight.cols // numa)
            shards = [amx_oracle.dequantise(data[2 * n], data[2 * n + 1], model.method, *shape) for n in range(numa)]
            joined = np.concatenate(shards, axis=0 if by_rows else 1)
            weights[f"{weight.role.removeprefix('expert.')}{weight.expert}"] = torch.from_numpy(joined)
    return weights


@pytest.mark.parametrize("form", ["safetensors", "kt"])
@pytest.mark.parametrize("numa", [1, 2])
@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_kt_kernel_computes_the_moe_of_what_was_written(
    source: Path, tmp_path: Path, method: str, numa: int, form: str
) -> None:
    convert(plan_repack(kconvert.inspect(source), AmxRecipe(method, numa, form=form)), tmp_path / "out")
    check_forward(tmp_path / "out", method, numa)


def test_kt_kernel_computes_the_moe_of_shards_that_were_cut_further(source: Path, tmp_path: Path) -> None:
    convert(plan_repack(kconvert.inspect(source), AmxRecipe("AMXINT4", 1)), tmp_path / "one")
    convert(plan_resplit(open_amx(tmp_path / "one"), 2, "safetensors"), tmp_path / "two")
    check_forward(tmp_path / "two", "AMXINT4", 2)


def check_forward(root: Path, method: str, numa: int) -> None:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(5, HIDDEN, generator=random).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=random)[:2] for _ in tokens])
    shares = torch.rand(len(tokens), 2, generator=random)
    output = amx_oracle.forward(root, method, numa, EXPERTS, INTERMEDIATE, tokens, ids, shares, layer=LAYER).float()
    expected = moe(dequantised(root, numa), tokens, ids, shares)
    # It rounds the activations to 8 bits a row, twice; bytes in a wrong order would give over 100%.
    assert (output - expected).norm() < 0.04 * expected.norm()
