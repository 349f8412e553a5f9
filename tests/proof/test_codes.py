"""Codes and scales counted, and whose convention they follow; against plain counting and real weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file

from kconvert.formats.conventions import COMPRESSED_TENSORS, KIMI, Convention
from kconvert.formats.fp8 import Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.formats.reference import packed as reference
from kconvert.proof.parity import codes

DATA = Path(__file__).parents[1] / "data"


def gaussian(rows: int = 64, cols: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", [64, 60])
def test_packed_codes_are_counted_without_the_tail(bits: int, cols: int) -> None:
    lowest = -(2 ** (bits - 1))
    stored = torch.randint(lowest, -lowest, (6, cols), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    state = {"weight_packed": pack_to_int32(stored, bits), "weight_scale": torch.ones(6, 1)}

    spread = codes.spread_of(Packed(None, bits=bits), state, (6, cols))

    assert +spread.codes == Counter(stored.flatten().tolist())
    assert len(spread.codes) == 2**bits


def test_codes_of_bytes_and_of_floats_are_counted_by_value() -> None:
    stored = torch.tensor([[-128, -1, 0, 127, 127]], dtype=torch.int8)
    spread = codes.spread_of(Int8(), {"weight": stored, "weight_scale": torch.tensor([[0.5]])}, (1, 5))
    assert +spread.codes == Counter({-128: 1, -1: 1, 0: 1, 127: 2})
    floats = torch.tensor([[448.0, -448.0, 0.0, -0.0, 1.5]]).to(torch.float8_e4m3fn)
    spread = codes.spread_of(Fp8("channel"), {"weight": floats, "weight_scale_inv": torch.ones(1, 1)}, (1, 5))
    assert +spread.codes == Counter({448: 1, -448: 1, 0: 2, 1.5: 1})
    assert len(spread.codes) == 253
    nibbles = torch.tensor([[0x1F, 0x80]], dtype=torch.uint8)
    spread = codes.spread_of(Mx(4), {"weight_packed": nibbles, "weight_scale": torch.tensor([[127]])}, (1, 4))
    assert +spread.codes == Counter({-6: 1, 0.5: 1, 0: 2})


def test_scales_are_counted_in_quarters_of_an_octave_and_zeros_are_not() -> None:
    state = {
        "weight_packed": torch.zeros(1, 4, dtype=torch.int32),
        "weight_scale": torch.tensor([[1.0, 1.2, 0.5, 0.0]]),
    }
    assert codes.spread_of(Packed(8), state, (1, 32)).scales == Counter({0: 1, 1: 1, -4: 1})


def test_what_a_weight_uses_of_its_grid() -> None:
    spread = codes.Spread(
        codes=Counter({**dict.fromkeys(map(float, range(-8, 8)), 0), 7.0: 3, -7.0: 1, 1.0: 12}),
        scales=Counter({-40: 9, -29: 1, -28: 2}),
    )
    use = codes.grid_use(spread, zero_groups=5)
    assert use == codes.GridUse(saturated=4 / 16, unused=13, zero_groups=5, outlier_groups=2)


def test_groups_that_are_zero_are_counted_also_the_short_last_one() -> None:
    values = torch.ones(2, 10).bfloat16()
    values[0, 4:8] = 0
    values[1, 8:] = 0
    assert codes.count_zero_groups(values, 4) == 2
    assert codes.count_zero_groups(values, 10) == 0


@pytest.mark.parametrize(("rule", "name"), [(KIMI, "kimi"), (COMPRESSED_TENSORS, "compressed-tensors")])
@pytest.mark.parametrize("group", [32, 128])
def test_the_convention_is_told_from_the_codes(rule: Convention, name: str, group: int) -> None:
    weight = gaussian()
    weight[3] = 0
    packed, _ = reference.encode(weight, group, rule)
    assert codes.convention_of(codes.extremes(Packed(group), packed, (64, 256))) == name


def test_groups_that_do_not_reach_the_ends_follow_neither_convention() -> None:
    """As with scales for a row, or scales that were learnt."""
    packed, _ = reference.encode(gaussian(), 256, KIMI)
    assert codes.convention_of(codes.extremes(Packed(32), packed, (64, 256))) is None


def test_zeros_follow_no_convention() -> None:
    packed, _ = reference.encode(torch.zeros(4, 64).bfloat16(), 32, KIMI)
    assert codes.convention_of(codes.extremes(Packed(32), packed, (4, 64))) is None


@pytest.mark.parametrize(
    ("file", "name"), [("kimi_k26_slice.safetensors", "kimi"), ("qwen_rtn_slice.safetensors", "compressed-tensors")]
)
def test_the_convention_of_published_weights_is_told_from_their_codes(file: str, name: str) -> None:
    tensors = load_file(DATA / file)
    (packed,) = (tensor for key, tensor in tensors.items() if key.endswith("weight_packed"))
    (scale,) = (tensor for key, tensor in tensors.items() if key.endswith("weight_scale"))
    cols = 8 * packed.shape[1]
    found = codes.extremes(Packed(cols // scale.shape[1]), packed, (len(packed), cols))
    assert codes.convention_of(found) == name
