"""`kconvert.open` of a repository: headers, and then the bytes of what is asked for."""

from pathlib import Path

import torch

import kconvert

NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


def test_tensors_come_from_the_hub_by_ranges(hub, remote: str, int4: Path) -> None:
    with kconvert.open(remote) as far, kconvert.open(int4) as near:
        assert far.keys() == near.keys()
        assert torch.equal(far[NAME], near[NAME])
        assert torch.equal(far.rows(NAME, 5, 9), near[NAME][5:9])
