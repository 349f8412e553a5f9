"""kv_b split by head into keys, transposed, and values; held against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kconvert.formats.dense import Dense
from kconvert.formats.engines.heads import Heads, Piece
from kconvert.formats.mx import Mx

KV_B = Heads((Piece("_k_b", 8, Dense("BF16"), transposed=True), Piece("_v_b", 4, Dense("BF16"))))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_keys_are_transposed_and_values_are_not(codec: Any, heads: int, dtype: str) -> None:
    weight = torch.randn(heads * 12, 20).bfloat16()
    format = Heads((Piece("_k_b", 8, Dense(dtype), transposed=True), Piece("embed", 4, Dense(dtype))))
    codec.tile_rows = 12
    tensors, lost = codec.encode(format, weight)
    k, v = weight.view(heads, 12, 20).split([8, 4], dim=1)
    assert lost == 0
    assert torch.equal(tensors["_k_b.weight"].bfloat16(), k.transpose(1, 2))
    assert torch.equal(tensors["embed.weight"].bfloat16(), v)


def test_each_piece_has_all_tensors_of_its_encoding(codec: Any) -> None:
    weight = torch.randn(2 * 64, 64).bfloat16()
    codec.tile_rows = 64
    tensors, _ = codec.encode(Heads((Piece("k", 32, Mx(4), transposed=True), Piece("v", 32, Mx(4)))), weight)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "k.weight_packed": [2, 64, 16],
        "k.weight_scale": [2, 64, 1],
        "v.weight_packed": [2, 32, 32],
        "v.weight_scale": [2, 32, 2],
    }
    codec.tile_rows = 8
    alone, _ = codec.encode(Mx(4), weight.view(2, 64, 64)[1, :32].T)
    assert torch.equal(tensors["k.weight_packed"][1], alone["weight_packed"])
    assert torch.equal(tensors["k.weight_scale"][1], alone["weight_scale"])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_numbers_that_stay_what_they_are_are_moved_bit_for_bit(dtype: str) -> None:
    """NaNs and the signs of zeros, too."""
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    weight = torch.randint(0, 256, (2 * 12, 20 * kind.itemsize), dtype=torch.uint8).view(kind)
    format = Heads((Piece("_k_b", 8, Dense(dtype), transposed=True), Piece("_v_b", 4, Dense(dtype))))
    assert format.takes_codes(Dense(dtype))
    assert not format.takes_codes(Dense("F32" if dtype == "BF16" else "BF16"))
    parts = [np.zeros(part.nbytes, np.uint8) for part in format.parts(24, 20)]
    format.recode(Dense(dtype), [weight.view(torch.uint8).numpy().reshape(-1)], 24, 20, parts)
    k, v = weight.view(2, 12, 20).split([8, 4], dim=1)
    for part, wanted in zip(parts, (k.transpose(1, 2), v), strict=True):
        assert part.tobytes() == wanted.contiguous().view(torch.uint8).numpy().tobytes()


def test_rows_that_are_no_whole_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole heads of 12"):
        KV_B.fit(Dense(), 30, 20, mse=False)
