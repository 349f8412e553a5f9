"""The bytes that kt-kernel itself packs, kept with the script that made them: data/make_amx_golden.py."""

from __future__ import annotations

import json

import amx_oracle
import make_amx_golden
import numpy as np
import pytest
import torch
from safetensors import safe_open

from kconvert.formats.engines.amx import METHODS, Amx
from kconvert.formats.reference import amx as reference
from kconvert.models.amx import PROJECTIONS

with safe_open(make_amx_golden.GOLDEN, "np") as golden:
    RECORDS = {record["name"]: record["packed"] for record in json.loads(golden.metadata()["cases"])}
    KEPT = {name: golden.get_tensor(name) for name in golden.keys()}  # noqa: SIM118 (it is no dict)

CASES = pytest.mark.parametrize("case", make_amx_golden.cases(), ids=lambda case: case.name)


def names(case: make_amx_golden.Case, projection: str, expert: int) -> list[str]:
    return [f"blk.0.ffn_{projection}_exps.{expert}.numa.{n}" for n in range(case.numa)]


@CASES
def test_the_kernels_pack_the_bytes_of_kt_kernel(case: make_amx_golden.Case) -> None:
    packed = {}
    for projection, experts in make_amx_golden.tensors(case).items():
        format = Amx(METHODS[case.method], case.numa, PROJECTIONS[projection])
        for expert, weight in enumerate(experts):
            outputs = [np.zeros(part.nbytes, np.uint8) for part in format.parts(*weight.shape)]
            format.encode(weight.float().numpy(), outputs)
            for n, stem in enumerate(names(case, projection, expert)):
                packed |= {f"{stem}.weight": outputs[2 * n], f"{stem}.scale": outputs[2 * n + 1]}
    assert {name: make_amx_golden.digest(data) for name, data in packed.items()} == RECORDS[case.name]


@CASES
def test_the_reference_packs_the_bytes_of_kt_kernel(case: make_amx_golden.Case) -> None:
    packed = {}
    for projection, experts in make_amx_golden.tensors(case).items():
        for expert, weight in enumerate(experts):
            shards = weight.chunk(case.numa, 1 if projection == "down" else 0)
            for stem, shard in zip(names(case, projection, expert), shards, strict=True):
                data, scale = reference.encode(shard, METHODS[case.method])
                packed |= {f"{stem}.weight": data.numpy(), f"{stem}.scale": scale.numpy()}
    assert {name: make_amx_golden.digest(data) for name, data in packed.items()} == RECORDS[case.name]


@pytest.mark.parametrize("case", [case for case in make_amx_golden.cases() if case.kept], ids=lambda case: case.name)
def test_kt_kernels_bytes_decode_to_the_values_that_its_formula_places(case: make_amx_golden.Case) -> None:
    for projection, experts in make_amx_golden.tensors(case).items():
        for expert, weight in enumerate(experts):
            (stem,) = names(case, projection, expert)
            data, scale = (KEPT[f"{case.name}/{stem}.{kind}"] for kind in ("weight", "scale"))
            expected = amx_oracle.dequantise(data, scale, case.method, *weight.shape)
            tensors = torch.from_numpy(data).view(torch.int8), torch.from_numpy(scale).view(torch.float32)
            assert torch.equal(
                reference.decode(*tensors, weight.shape[1], METHODS[case.method]), torch.tensor(expected)
            )
            decoded = np.empty(weight.shape, np.float32)
            Amx(METHODS[case.method]).decode([data, scale.view(np.uint8)], 0, decoded)
            assert (decoded == expected).all()
