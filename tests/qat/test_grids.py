"""MXFP4, NVFP4 and block FP8: each bit for bit what its encoder and decoder make, by kernel, torch, eager and compiled."""

import copy

import numba
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, attach, detach, prepare
from kconvert_qat.experts import find_experts
from kconvert_qat.grid import _by_reference, encode, fake_quantise, reaches
from kconvert_qat.grids import vectors
from kconvert_qat.grids.table import GRIDS

NEW = [(name, convention) for name, grid in GRIDS.items() for convention in grid.conventions if name != "int4"]
ALL = [(name, convention) for name, grid in GRIDS.items() for convention in grid.conventions]
each = pytest.mark.parametrize(("grid", "convention"), NEW)
every = pytest.mark.parametrize(("grid", "convention"), ALL)


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_same(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b))


def weights(rows=200, cols=192):
    """Two matrices: Gaussian groups, groups of zeros of both signs, subnormal and enormous ones, and values on each grid."""
    torch.manual_seed(0)
    weight = torch.randn(2, rows, cols).bfloat16() * 0.02
    weight[0, 0, :64] = 0
    weight[0, 0, 40] = -0.0
    weight[0, 1] *= 2.0**-120
    weight[0, 2, ::3] = 0
    weight[0, 3] *= 2.0**100
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    weight[1, :40] = (codes[torch.randint(0, 16, (40, cols))] * 2.0 ** torch.randint(-9, -2, (40, 1))).bfloat16()
    return weight


def options(grid, convention):
    return GRIDS[grid].size, convention, False, grid


def encoded(matrix, grid, convention):
    """The tensors' bytes of the format that an export writes."""
    format = GRIDS[grid].format(GRIDS[grid].size, convention)
    parts = [np.zeros(part.nbytes, np.uint8) for part in format.parts(*matrix.shape)]
    if grid == "nvfp4":
        format.settle(reaches(matrix, None, grid)[0], parts)
    format.encode(matrix.bfloat16().float().numpy(), parts)
    return parts


def by_encoder(weight, grid, convention):
    """Each matrix by the format that an export writes, whole."""
    format = GRIDS[grid].format(GRIDS[grid].size, convention)
    found = []
    for matrix in weight:
        parts = encoded(matrix, grid, convention)
        tile = np.empty(matrix.shape, np.float32)
        format.decode(parts, 0, tile)
        found.append(torch.from_numpy(tile).to(weight.dtype))
    return torch.stack(found)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_trainer_sees_what_the_encoder_writes_and_the_decoder_reads(grid, convention, dtype):
    weight = weights().to(dtype) * (1 if dtype == torch.bfloat16 else 1.001)
    served = fake_quantise(weight, *options(grid, convention))
    assert_same(served, by_encoder(weight, grid, convention))
    size, reach = GRIDS[grid].size, reaches(weight, None, grid)
    assert_same(served, _by_reference(weight, size, convention, grid, reach))
    assert_same(served, encode(weight, size, convention, grid).values())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exponent", [-140, -133, -127, -126, -125, -118, -116, -110, -1, 60, 118, 127])
def test_the_kernels_keep_to_the_encoder_at_the_ends_of_the_exponents(grid, convention, dtype, exponent):
    """Subnormal values and scales, and the largest; matrices whose last block is short both ways."""
    torch.manual_seed(exponent)
    weight = ((torch.rand(2, 150, 160, dtype=torch.float64) * 2 - 1) * 2.0**exponent).to(dtype)
    weight[1] *= (2.0 ** torch.randint(-20, 1, (150, 1))).to(dtype)
    weight[1, :8] *= (torch.rand(8, 160) < 0.2).to(dtype)  # zeros of both signs
    assert_same(fake_quantise(weight, *options(grid, convention)), by_encoder(weight, grid, convention))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reach_of_a_matrix_is_its_largest_finite_magnitude_as_bf16(dtype):
    torch.manual_seed(0)
    weight = torch.randn(3, 4000, 80, dtype=dtype)  # each in several pieces
    weight[0, 3999, 79], weight[1, 0, 0], weight[2] = -7.123, float("inf"), 0
    weight[1, 0, 1], weight[1, 2000, 5] = float("nan"), 9.987
    finite = weight.nan_to_num(0, 0, 0).bfloat16().abs().amax((1, 2))
    assert reaches(weight, None, "nvfp4") == finite.tolist()
    assert reaches(weight[1], weight[0].mT.contiguous(), "nvfp4") == [float(finite[:2].max())]


@pytest.mark.parametrize("narrows", [True, False])
def test_normal_numbers_are_rounded_alike_with_the_processors_instruction_and_without(monkeypatch, narrows):
    if narrows and not vectors.NARROWS:
        pytest.skip("this processor has no instruction that rounds to bf16")
    monkeypatch.setattr(vectors, "NARROWS", narrows)

    @numba.njit
    def rounded(values, served):
        for row in range(values.shape[0]):
            vectors.store_normal(served, row, 0, vectors.load_normal(values, row, 0, 32))

    torch.manual_seed(0)
    values = torch.randn(64, 32) * 2.0 ** torch.randint(-120, 120, (64, 1))
    values[0] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]).repeat(16)  # halves, to even
    served = np.zeros((64, 32), np.uint16)
    rounded(values.numpy(), served)
    assert np.array_equal(served, values.bfloat16().view(torch.int16).numpy().view(np.uint16))


@every
def test_compiled_equals_eager(grid, convention):
    weight = weights(130, 128)
    compiled = torch.compile(lambda w: fake_quantise(w * 1, *options(grid, convention)) + 0, fullgraph=True)
    assert_same(compiled(weight), fake_quantise(weight, *options(grid, convention)) + 0)


@each
def test_the_gradient_passes_straight_through(grid, convention):
    weight = weights().float().requires_grad_()
    fake_quantise(weight, *options(grid, convention)).mul(torch.arange(192.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(192.0).expand(2, 200, -1))


@every
def test_what_is_on_the_grid_stays(grid, convention):
    if convention == "f32":
        pytest.skip("the scale of a block is amax / 448, which a bf16 amax does not tell")
    once = fake_quantise(weights(), *options(grid, convention))
    assert_same(fake_quantise(once, *options(grid, convention)), once)


def test_the_mxfp4_rule_is_the_one_of_compressed_tensors():
    """Its own scales and rounding to FP4; groups of zeros apart, whose sign of zero the library drops."""
    weight = weights()[0, 4:, :64]
    groups = weight.reshape(-1, 2, 32)
    scale = torch.pow(2.0, generate_mx_scales(groups.abs().amax(-1)).float() - 127).unsqueeze(-1)
    wanted = (cast_to_fp4(groups.float() / scale) * scale).bfloat16()
    assert torch.equal(fake_quantise(weight, *options("mxfp4", "compressed-tensors")).view(-1, 2, 32), wanted)


def test_compressed_tensors_decompresses_an_mxfp4_export_to_what_training_saw():
    weight = weights()[:, 4:]  # rows before these have scales of which the library's powers of two are not exact
    for matrix in weight:
        codes, scale = encoded(matrix, "mxfp4", "compressed-tensors")
        state = {
            "weight_packed": torch.from_numpy(codes).view(matrix.shape[0], -1),
            "weight_scale": torch.from_numpy(scale).view(matrix.shape[0], -1),
        }
        args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        read = MXFP4PackedCompressor.decompress(state, scheme)["weight"]
        assert_same(fake_quantise(matrix, *options("mxfp4", "compressed-tensors")), read.bfloat16())


@pytest.mark.parametrize("largest", [0.5, 1, 1.5, 2, 3, 4, 6])
def test_groups_of_a_kimi_k3_stay_whatever_rule_chose_their_scales(largest):
    """With codes up to `largest` alone, which compressed-tensors' rule would have made larger, and zeros of both signs."""
    torch.manual_seed(0)
    codes = torch.tensor([code for code in (0, 0.5, 1, 1.5, 2, 3, 4, 6) if code <= largest])
    exponents = torch.arange(-127, 126).view(-1, 1)
    chosen = codes[torch.randint(0, len(codes), (len(exponents), 32))]
    chosen[:, 0] = largest
    signs = torch.where(torch.rand(chosen.shape) < 0.5, -1.0, 1.0)
    weight = (signs * chosen * torch.pow(2.0, exponents.double())).bfloat16()
    assert_same(fake_quantise(weight, *options("mxfp4", "compressed-tensors")), weight)
    trained = weight.clone()
    trained[:, 1] = trained[:, 0] * 0.3  # no code: such a group gets the rule's scale
    assert not torch.equal(fake_quantise(trained, *options("mxfp4", "compressed-tensors")), trained)


@every
def test_a_group_with_a_value_that_is_not_finite_becomes_nan_alone(grid, convention):
    weight = weights()
    weight[0, 140, 3], weight[1, 10, 150] = float("inf"), float("nan")
    served = fake_quantise(weight, *options(grid, convention))
    size, rows = GRIDS[grid].size, GRIDS[grid].rows
    first = {1: 1, 128: 200 - 128}[rows] * size  # the second row of blocks is short
    second = {1: 1, 128: 128}[rows] * min(size, 192 - 150 // size * size)
    assert int(served.isnan().sum()) == first + second
    assert served[0, 140, :size].isnan().all()
    reach = reaches(weight, None, grid)
    wanted = _by_reference(weight, size, convention, grid, reach)
    assert torch.equal(served.isnan(), wanted.isnan())
    assert torch.equal(served.nan_to_num(0), wanted.nan_to_num(0))
    assert torch.equal(encode(weight, size, convention, grid).values().isnan(), wanted.isnan())


@each
def test_the_operator_is_sound_by_torchs_own_check(grid, convention):
    weight = weights(130, 128).float().requires_grad_()
    torch.library.opcheck(torch.ops.kconvert.fake_quantise.default, (weight, *options(grid, convention)))


def quantised(model, grid, convention):
    """A copy whose expert matrices are the grid's values, one by one; gate and up by the larger of their magnitudes.

    They lie in memory as prepared modules have them, by output: on CPUs without AVX-512 torch's sums depend on that.
    """
    model = copy.deepcopy(model)
    for weight in find_experts(model):
        data = weight.tensor.data
        if weight.transposed:
            data = weight.tensor.data = data.mT.contiguous().mT
        for expert in range(len(data) if weight.stacked else 1):
            matrices = [weight.matrix(data, expert, piece) for piece in weight.pieces]
            pair = torch.cat(matrices)
            for matrix in matrices:
                mate = pair.contiguous() if grid == "nvfp4" else None
                matrix.copy_(fake_quantise(matrix.contiguous(), *options(grid, convention), mate))
    return model


@each
def test_a_prepared_model_computes_what_the_quantised_one_does(tiny, family, ids, grid, convention):
    model = tiny(family)
    before, wanted = model(ids).logits, quantised(model, grid, convention)(ids).logits
    prepare(model, QATConfig(grid=grid, convention=convention))
    assert torch.equal(model(ids).logits, wanted)
    assert not torch.equal(wanted, before)
    detach(model)
    assert torch.equal(model(ids).logits, before)


@each
def test_the_gradients_are_those_of_the_quantised_model(tiny, family, ids, grid, convention):
    model = tiny(family)
    wanted = quantised(model, grid, convention)
    prepare(model, QATConfig(grid=grid, convention=convention))
    for one in (model, wanted):
        one(ids).logits.float().square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


@each
@pytest.mark.parametrize("keep", ["served", "codes"])
def test_evaluation_and_copies_see_a_weight_that_changed_whatever_is_kept(tiny, ids, grid, convention, keep):
    model, plain = tiny(), tiny()
    prepare(model, QATConfig(grid=grid, convention=convention, keep=keep))
    seen = []
    for factor in (1.0, 1.1):
        for one in (model, plain):
            find_experts(one)[0].tensor.data.mul_(factor)  # torch does not count it
        seen.append(quantised(plain, grid, convention)(ids).logits)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, seen[-1])
        assert torch.equal(copy.deepcopy(model)(ids).logits, seen[-1])
    assert not torch.equal(*seen)


def test_gate_and_up_in_linears_of_their_own_share_the_scale_of_nvfp4(module_list):
    """As engines fuse them; it shows where one of the two is much smaller."""
    with torch.no_grad():
        for expert in module_list.experts:
            expert.up_proj.weight.mul_(2.0**20)
    x = torch.randn(5, 64).bfloat16()
    prepare(module_list, QATConfig(grid="nvfp4"))
    expert = module_list.experts[0]
    wanted = fake_quantise(expert.gate_proj.weight, *options("nvfp4", "power-of-two"), expert.up_proj.weight)
    alone = fake_quantise(expert.gate_proj.weight, *options("nvfp4", "power-of-two"))
    assert not torch.equal(wanted, alone)
    assert torch.equal(attach.attached_to(expert.gate_proj).serve(expert.gate_proj, "weight"), wanted)
    first = module_list(x)
    with torch.no_grad():
        expert.up_proj.weight.mul_(2.0**-20)
    assert torch.equal(attach.attached_to(expert.gate_proj).serve(expert.gate_proj, "weight"), alone)
    assert not torch.equal(module_list(x), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "int3"}, "grid is 'int3', but it must be one of int4, mxfp4, nvfp4, fp8-block"),
        ({"grid": "mxfp4", "group_size": 64}, "group_size is 64, but it must be 32, as mxfp4 has no other"),
        ({"grid": "nvfp4", "convention": "kimi"}, "convention is 'kimi', but it must be one of power-of-two"),
        ({"grid": "mxfp4", "gradient": "clip"}, "gradient is 'clip', but it must be straight-through for mxfp4"),
    ],
)
def test_a_grid_that_there_is_not_is_refused(options, message):
    with pytest.raises(KconvertError, match=message):
        QATConfig(**options)


def test_a_configuration_goes_to_json_and_back():
    for grid, convention in ALL:
        config = QATConfig(grid=grid, convention=convention)
        assert QATConfig.from_json(config.to_json()) == config


def test_a_width_that_does_not_divide_is_refused_and_changes_nothing(tiny):
    model = tiny()
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.detach()[..., :40].clone())
    with pytest.raises(KconvertError, match="40 inputs, which do not divide into groups of 32"):
        prepare(model, QATConfig(grid="mxfp4"))
    assert attach.attached_to(experts) is None
