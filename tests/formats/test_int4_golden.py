"""INT4 against other people's bits: slices of published checkpoints, and compressed-tensors' own decompression."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kconvert.formats.conventions import KIMI
from kconvert.formats.dense import Dense
from kconvert.formats.packed import Packed

DATA = Path(__file__).parents[1] / "data"
FINITE = np.array([bits for bits in range(1 << 16) if bits & 0x7F80 != 0x7F80], np.uint16)


def flat(tensor):
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy().copy()


def without_zeros(scales):
    """A scale of zero is refused unless all codes are; see below."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def decode(packed, scale, cols, group_size):
    """BF16 bits [rows, cols] by our code, from torch tensors."""
    tile = np.full((len(packed), cols), np.nan, np.float32)
    Packed(group_size, None).decode([flat(packed), flat(scale)], 0, tile)
    out = np.empty(2 * tile.size, np.uint8)
    Dense("BF16").encode(tile, [out])
    return out.view(np.uint16).reshape(tile.shape)


def decompress(packed, scale, cols, group_size):
    """The same by compressed-tensors."""
    args = QuantizationArgs(num_bits=4, strategy="group" if group_size else "channel", group_size=group_size)
    state = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([len(packed), cols])}
    weight = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))[
        "weight"
    ]
    assert weight.dtype is torch.bfloat16
    return bits_of(weight)


def bits_of(weight):
    return weight.contiguous().view(torch.uint16).numpy()


@pytest.fixture(scope="module")
def kimi():
    return load_file(DATA / "kimi_k26_slice.safetensors")


@pytest.fixture(scope="module")
def qwen():
    return load_file(DATA / "qwen_rtn_slice.safetensors")


def test_a_slice_of_kimi_decodes_to_the_published_values(kimi):
    found = decode(kimi["weight_packed"], kimi["weight_scale"], 64, 32)
    assert np.array_equal(found, bits_of(kimi["weight"]))


def test_the_values_of_kimi_encode_to_the_published_codes_and_scales(kimi):
    tile = kimi["weight"].float().numpy()
    packed, scale = np.zeros(8 * 32, np.uint8), np.zeros(8 * 2 * 2, np.uint8)
    Packed(32, None, KIMI).encode(tile, [packed, scale])
    assert np.array_equal(packed, flat(kimi["weight_packed"]))
    assert np.array_equal(scale, flat(kimi["weight_scale"]))


def test_a_slice_of_qwen_with_its_lowest_codes_decodes_as_compressed_tensors_does(qwen):
    packed, scale = qwen["weight_packed"], qwen["weight_scale"]
    assert ((flat(packed) & 15 == 0) | (flat(packed) >> 4 == 0)).any(), "no code of -8 in it"
    assert np.array_equal(decode(packed, scale, 64, 32), decompress(packed, scale, 64, 32))


def all_codes(rows, groups, group_size):
    """Packed words in which every group of `group_size` columns holds each of the 16 codes."""
    row = torch.tensor([0x76543210, 0xFEDCBA98 - (1 << 32)], dtype=torch.int32)
    return row.repeat(rows, groups * group_size // 16)


@pytest.mark.parametrize("group_size", [32, None])
def test_every_code_times_every_finite_scale_equals_compressed_tensors(group_size):
    scales = without_zeros(torch.from_numpy(FINITE.copy()).view(torch.bfloat16))
    scale = scales.reshape(-1, 8 if group_size else 1)
    cols = scale.shape[1] * 32
    packed = all_codes(len(scale), scale.shape[1], 32)
    assert np.array_equal(decode(packed, scale, cols, group_size), decompress(packed, scale, cols, group_size))


@given(st.data(), st.sampled_from([32, 64, 128, None]), st.integers(1, 5), st.integers(1, 3), st.randoms())
@settings(max_examples=60)
def test_random_words_and_scales_decode_as_compressed_tensors_does(data, group_size, rows, groups, random):
    width = (group_size or 8) * groups
    scales = data.draw(
        st.lists(
            st.sampled_from([0, 1, 0x7F, 0x80, 0x8000, 0x8001, 0x7F7F, 0xFF7F])
            | st.integers(0, len(FINITE) - 1).map(FINITE.item),
            min_size=rows * (groups if group_size else 1),
            max_size=rows * (groups if group_size else 1),
        )
    )
    packed = torch.frombuffer(bytearray(random.randbytes(rows * width // 2)), dtype=torch.int32).reshape(rows, -1)
    scale = without_zeros(torch.tensor(scales, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)).reshape(
        rows, -1
    )
    assert np.array_equal(decode(packed, scale, width, group_size), decompress(packed, scale, width, group_size))


@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_a_scale_of_zero_is_good_for_codes_of_zero_only(scale):
    packed = torch.full((1, 4), -0x77777778, dtype=torch.int32)
    zero = torch.tensor([[scale]]).bfloat16()
    assert np.array_equal(decode(packed, zero, 32, 32), decompress(packed, zero, 32, 32))
    packed[0, 3] = 0x78888888
    with pytest.raises(ValueError, match="scale of zero over codes that are not"):
        decode(packed, zero, 32, 32)


@pytest.mark.parametrize("cols", [1, 4, 15, 20, 24])
def test_nibbles_beyond_the_last_column_are_cut_off(cols):
    packed = torch.randint(-(1 << 31), 1 << 31, (3, -(-cols // 8)), generator=torch.Generator().manual_seed(cols))
    packed, scale = packed.to(torch.int32), torch.tensor([[0.5], [1.0], [3.0]]).bfloat16()
    assert np.array_equal(decode(packed, scale, cols, None), decompress(packed, scale, cols, None))


@given(st.integers(0, 3), st.integers(1, 6))
@settings(max_examples=20)
def test_a_tile_of_some_rows_decodes_as_those_rows_of_the_whole(first, count):
    generator = torch.Generator().manual_seed(first)
    packed = torch.randint(-(1 << 31), 1 << 31, (9, 16), generator=generator).to(torch.int32)
    scale = torch.rand((9, 4), generator=generator).bfloat16()
    whole = decode(packed, scale, 128, 32)
    parts = Packed(32, None).parts(9, 128)
    data = [flat(packed), flat(scale)]
    cut = [bytes_[slice(*part.span(9, first, first + count))] for part, bytes_ in zip(parts, data, strict=True)]
    tile = np.empty((count, 128), np.float32)
    Packed(32, None).decode(cut, first, tile)
    assert np.array_equal((tile.view(np.uint32) >> 16).astype(np.uint16), whole[first : first + count])
    assert not (tile.view(np.uint32) & 0xFFFF).any(), "a value that is not exact in bf16"


def test_a_group_of_zeros_encodes_to_a_zero_scale_and_zero_codes():
    packed, scale = np.full(16, 255, np.uint8), np.full(2, 255, np.uint8)
    Packed(32, None).encode(np.zeros((1, 32), np.float32), [packed, scale])
    assert packed.tolist() == [0x88] * 16
    assert scale.tolist() == [0, 0]


@given(st.lists(st.integers(-7, 7), min_size=31, max_size=31), st.integers(0x0080, 0x7D00), st.sampled_from([7, -7]))
def test_codes_survive_the_way_to_values_and_back(codes, scale, extreme):
    codes = np.array([extreme, *codes], np.int16)
    packed = (codes[::2] + 8 | (codes[1::2] + 8) << 4).astype(np.uint8)
    tile = np.empty((1, 32), np.float32)
    Packed(32, None).decode([packed, np.array([scale], np.uint16).view(np.uint8)], 0, tile)
    again, scale_again = np.empty(16, np.uint8), np.empty(2, np.uint8)
    Packed(32, None).encode(tile, [again, scale_again])
    assert np.array_equal(again, packed)
