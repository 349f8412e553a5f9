"""The grid: one arithmetic, bit for bit the INT4 encoder's and its decoder's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.packed import Packed
from kconvert.formats.reference import packed as reference
from kconvert_qat.grid import fake_quantise

DATA = Path(__file__).parents[1] / "data"
both = pytest.mark.parametrize("convention", list(CONVENTIONS))
# bf16 bits of the first values of a group, the others zero -> of what is served; worked out by hand.
GOLDEN = {
    "kimi": {
        (0x3F80, 0xBF80): (0x3F80, 0xBF80),  # on a grid
        (0x3F81, 0x3F00): (0x3F81, 0x3EDC),  # scale 147 * 2^-10; 3 scales are a tie that goes down to even
        (0x000F, 0x0004): (0x000E, 0x0004),  # denormal: the scale is two of the smallest numbers
        (0x0000, 0x8000): (0x0000, 0x0000),
    },
    "compressed-tensors": {
        (0x3F80, 0xBF80): (0x3F80, 0xBF80),
        (0xC010, 0x3F81): (0xC007, 0x3F67),  # scale 154 * 2^-9, codes -7 and 3
        (0xBFF0, 0x3F81): (0xC000, 0x3F80),  # scale 1/4, codes -8 and 4
        (0x0000, 0x8000): (0x0000, 0x0000),
    },
}


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_same(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b))


def weights(seed=0):
    """Gaussian groups, groups of zeros, denormal ones and ones that are on a grid."""
    torch.manual_seed(seed)
    weight = torch.randn(64, 256).bfloat16()
    weight[0, :64] = 0
    weight[1] *= 2.0**-130
    weight[2, ::3] = 0
    weight[3:8] = fake_quantise(torch.randn(5, 256).bfloat16(), 32, "compressed-tensors")
    return weight


def by_encoder(weight, convention, group=32):
    """Encoded and decoded by the format that the exporter writes."""
    rows, cols = weight.shape
    format = Packed(group, None, convention=CONVENTIONS[convention], exact=True)
    parts = [np.zeros(part.nbytes, np.uint8) for part in format.parts(rows, cols)]
    format.encode(weight.bfloat16().float().numpy(), parts)
    tile = np.empty((rows, cols), np.float32)
    format.decode(parts, 0, tile)
    return torch.from_numpy(tile).to(weight.dtype), parts


@both
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_trainer_sees_what_the_exporter_writes_and_the_decoder_reads(convention, group, dtype):
    weight = weights().to(dtype) * (1 if dtype == torch.bfloat16 else 1.001)
    served = fake_quantise(weight, group, convention)
    assert_same(served, by_encoder(weight, convention, group)[0])
    assert_same(served, reference.fake_quantise(weight, group, CONVENTIONS[convention]))


@both
def test_compressed_tensors_decompresses_the_export_to_the_same_bits(convention):
    weight = weights()
    _, (codes, scale) = by_encoder(weight, convention)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    state = {
        "weight_packed": torch.from_numpy(codes).view(torch.int32).view(64, -1),
        "weight_scale": torch.from_numpy(scale).view(torch.bfloat16).view(64, -1),
        "weight_shape": torch.tensor([64, 256]),
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    assert_same(fake_quantise(weight, 32, convention), PackedQuantizationCompressor.decompress(state, scheme)["weight"])


@pytest.mark.parametrize(("name", "convention"), [("kimi_k26_slice", "kimi"), ("qwen_rtn_slice", "compressed-tensors")])
def test_published_weights_come_out_as_published(name, convention):
    """But for groups that codes reproduce as they are, which the publisher's rule rounded."""
    tensors = load_file(DATA / f"{name}.safetensors")
    weight = tensors["weight"]
    group = weight.shape[1] // tensors["weight_scale"].shape[1]
    shipped = reference.decode(tensors["weight_packed"], tensors["weight_scale"], weight.shape[1])
    served = fake_quantise(weight, group, convention).view(-1, group)
    kept = (served == weight.view(-1, group)).all(-1)
    assert_same(served[~kept], shipped.view(-1, group)[~kept])
    assert name == "kimi_k26_slice" or (~kept).sum() > len(kept) / 2
    if name == "kimi_k26_slice":
        assert_same(served, shipped.view(-1, group))


@both
def test_golden_groups_come_out_in_these_bits(convention):
    for given, wanted in GOLDEN[convention].items():
        group = torch.zeros(32, dtype=torch.int32)
        group[: len(given)] = torch.tensor(given)
        served = fake_quantise(group.to(torch.int16).view(torch.bfloat16), 32, convention)
        assert tuple(int(v) & 0xFFFF for v in bits(served)[: len(given)]) == wanted, [hex(v) for v in given]


@both
def test_what_is_on_the_grid_stays_whatever_the_mantissa_of_the_scale(convention):
    scales = torch.arange(0x0080, 0x7B80, 7, dtype=torch.int16).view(torch.bfloat16)
    scales = torch.cat([scales, torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)])
    torch.manual_seed(0)
    lowest = CONVENTIONS[convention].lowest
    codes = torch.randint(lowest, 8, (len(scales), 32)).float()
    on_grid = (codes * scales.float().unsqueeze(-1)).bfloat16()
    assert_same(fake_quantise(on_grid, 32, convention), on_grid)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exponent", [-133, -128, -124, -123, -122, -100, 0, 100, 127])
def test_every_quotient_of_two_mantissas_gets_the_references_code(convention, dtype, exponent):
    """Of six octaves below each largest value: ties, and what is next to them; near both ends of the exponents, too."""
    largest = torch.arange(128, 256) * 2.0 ** (exponent - 7)
    octaves = 2.0 ** torch.arange(-5, 1).unsqueeze(-1) * torch.arange(128, 256) / 256
    rest = (largest.unsqueeze(-1) * 0 + 2.0**exponent * octaves.flatten()).view(128, 24, 32)[..., :31]
    signs = torch.tensor([1.0, -1.0]).repeat(64).view(-1, 1, 1)
    groups = signs * torch.cat([largest.view(-1, 1, 1).expand(-1, 24, 1), rest], -1)
    weight = groups.to(dtype).view(-1, 96)
    for group in (32, 96, 24):  # of whole vectors, and of parts of one
        wanted = reference.fake_quantise(weight, group, CONVENTIONS[convention])
        assert_same(fake_quantise(weight, group, convention), wanted)


@both
def test_quantising_twice_changes_nothing_more(convention):
    torch.manual_seed(1)
    once = fake_quantise(torch.randn(512, 256).bfloat16(), 32, convention)
    assert_same(fake_quantise(once, 32, convention), once)


@both
def test_compiled_equals_eager(convention):
    weight = weights()
    compiled = torch.compile(lambda w: fake_quantise(w * 1, 32, convention) + 0, fullgraph=True)
    assert_same(compiled(weight), fake_quantise(weight, 32, convention) + 0)


@both
def test_a_group_with_a_value_that_is_not_finite_becomes_nan_alone(convention):
    weight = weights()
    weight[9, 3], weight[10, 40] = float("inf"), float("nan")
    served = fake_quantise(weight, 32, convention)
    assert served.isnan().sum() == 64
    assert served[9, :32].isnan().all()
    assert served[10, 32:64].isnan().all()


def test_the_gradient_passes_straight_through():
    weight = weights().float().requires_grad_()
    fake_quantise(weight, 32, "kimi").mul(torch.arange(256.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(256.0).expand(64, -1))


def test_the_clipped_gradient_is_zero_where_the_code_is_clamped():
    weight = torch.tensor([[7.5, -7.5, 1.0] + [0.3] * 29], requires_grad=True)
    fake_quantise(weight, 32, "compressed-tensors", clip=True).sum().backward()
    assert weight.grad[0, :3].tolist() == [0, 1, 1]  # 7.5 / 1 rounds to 8, past the highest code, and to -8, the lowest


def test_the_operators_are_sound_by_torchs_own_check():
    weight = weights().float().requires_grad_()
    torch.library.opcheck(torch.ops.kconvert.fake_quantise.default, (weight, 32, "kimi", True))
    plain = weight.detach()
    torch.library.opcheck(torch.ops.kconvert.clip_gradient.default, (plain, plain, 32, "compressed-tensors"))
