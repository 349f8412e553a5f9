"""Training on a CUDA device: the grid's bits are the CPU's. Skipped where there is none."""

import copy

import pytest
import torch

from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.reference import packed as reference
from kconvert_qat import prepare
from kconvert_qat.grid import fake_quantise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def on_the_grid(gaussian):
    return fake_quantise(gaussian.bfloat16(), 32, "compressed-tensors").float()


def ties(gaussian):
    """Halves of 7 steps and of 7.5."""
    codes = torch.randint(-15, 16, gaussian.shape).float()
    return codes * (0.375 * 2.0 ** torch.randint(-20, 20, (len(gaussian), 1)))


KINDS = {
    "Gaussian": lambda gaussian: gaussian,
    "heavy-tailed": lambda gaussian: torch.distributions.StudentT(2.0).sample(gaussian.shape),
    "zeros": lambda gaussian: torch.where(gaussian > 2, gaussian, gaussian * 0),  # of both signs; whole groups of them
    "denormal": lambda gaussian: torch.randint(-400, 400, gaussian.shape).float() * 2.0**-133,
    "huge": lambda gaussian: gaussian * 2.0**126,
    "ties": ties,
    "on the grid": on_the_grid,
    "not finite": lambda gaussian: torch.where(gaussian > 3.5, torch.inf, torch.where(gaussian < -3.5, torch.nan, 1)),
}


def weights(kind, cols=768, rows=512):
    torch.manual_seed(0)
    return KINDS[kind](torch.randn(rows, cols))


# A grid, its convention, and the columns that have a scale.
SPELT = [
    *(("int4", convention, size) for convention in CONVENTIONS for size in (24, 32)),
    ("mxfp4", "compressed-tensors", 32),
    ("nvfp4", "power-of-two", 16),
    ("fp8-block", "f32", 128),
    ("fp8-block", "ue8m0", 128),
]


def grid_weights(kind, grid, dtype):
    """One or two matrices, whose last program is not full, and what engines fuse with a single one."""
    if grid == "fp8-block":
        return weights(kind, 160, 2 * 130).to(dtype).view(2, 130, 160), None
    found = weights(kind, 96, 2 * 5).to(dtype)
    return (found[:5], found[5:] * 4) if grid == "nvfp4" and dtype == torch.float32 else (found.view(2, 5, 96), None)


def bits(tensor):
    tensor = torch.where(tensor.isnan(), 1e38, tensor)  # of NaN there are many
    return tensor.cpu().contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("convention", list(CONVENTIONS))
@pytest.mark.parametrize("group", [24, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_equals_the_cpus_kernel_and_the_reference(kind, convention, group, dtype):
    weight = weights(kind).to(dtype)
    served = bits(fake_quantise(weight.cuda(), group, convention))
    assert torch.equal(served, bits(fake_quantise(weight, group, convention)))
    assert torch.equal(served, bits(reference.fake_quantise(weight, group, CONVENTIONS[convention])))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("grid", "convention", "size"), SPELT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_grid_on_cuda_has_the_bits_of_the_cpu(kind, grid, convention, size, dtype):
    weight, mate = grid_weights(kind, grid, dtype)
    served = fake_quantise(weight.cuda(), size, convention, False, grid, None if mate is None else mate.cuda())
    assert torch.equal(bits(served), bits(fake_quantise(weight, size, convention, False, grid, mate)))


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_compiled_on_cuda_equals_the_cpu(convention):
    weight = weights("Gaussian").bfloat16()
    compiled = torch.compile(lambda w: fake_quantise(w * 1, 32, convention) + 0, fullgraph=True)
    assert torch.equal(bits(compiled(weight.cuda())), bits(fake_quantise(weight, 32, convention) + 0))


def test_a_weight_whose_last_program_is_not_full_is_served_whole():
    weight = weights("Gaussian", 32, 3)
    assert torch.equal(bits(fake_quantise(weight.cuda(), 32, "kimi")), bits(fake_quantise(weight, 32, "kimi")))


def test_a_training_step_on_cuda_lowers_the_loss_and_stays_on_the_grid(tiny, ids):
    model, ids = tiny(dtype=torch.float32).cuda(), ids.cuda()
    covered = prepare(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    quantised = copy.deepcopy(model).cpu()
    for weight in covered.weights:
        served = fake_quantise(weight.tensor.detach(), 32, "kimi")
        assert torch.equal(bits(served), bits(fake_quantise(weight.tensor.detach().cpu(), 32, "kimi")))
    torch.testing.assert_close(model(ids).logits.cpu(), quantised(ids.cpu()).logits, rtol=1e-3, atol=1e-3)
