"""keep="backward": the grid once a step of several micro-batches, and no memory that training has not without it."""

import copy
import functools
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kconvert_qat import QATConfig, detach, prepare
from kconvert_qat.grids import serving


class Experts(nn.Module):
    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 64, 32) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(2, 32, 32) * 0.3)

    def forward(self, x):
        gate, up = torch.bmm(x, self.gate_up_proj.mT).chunk(2, -1)
        return torch.bmm(nn.functional.silu(gate) * up, self.down_proj.mT)


@pytest.fixture
def layers():
    """Two layers of two weights each, which SGD trains."""
    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    prepare(model)
    return model


@pytest.fixture
def made(monkeypatch):
    """Weak references to all that is computed, in order."""
    references = []
    real = serving.fake_quantise

    def noting(*args):
        served = real(*args)
        references.append(weakref.ref(served))
        return served

    monkeypatch.setattr(serving, "fake_quantise", noting)
    return references


def alive(made):
    return sum(reference() is not None for reference in made)


def inputs(needs_gradient=True):
    return torch.randn(2, 4, 32).requires_grad_(needs_gradient)


def step(layers, batches, needs_gradient=True, rate=1e-2):
    for _ in range(batches):
        layers(inputs(needs_gradient)).sum().backward()
    optimiser = torch.optim.SGD(layers.parameters(), lr=rate)
    optimiser.step()
    optimiser.zero_grad()


def computed(made, work):
    before = len(made)
    work()
    return len(made) - before


def test_it_is_the_default():
    assert QATConfig().keep == "backward"


def test_micro_batches_compute_the_grid_once_a_step_when_a_step_has_shown_that_there_are_several(layers, made):
    assert [computed(made, lambda: step(layers, 8)) for _ in range(3)] == [8, 4, 4]


def test_a_second_forward_before_the_backward_pass_finds_what_that_will_need(layers, made):
    for _ in range(2):
        assert computed(made, lambda: (layers(inputs()) + layers(inputs())).sum().backward()) == 4
        step(layers, 0)
    assert alive(made) == 0


def test_the_backward_pass_of_a_single_batch_leaves_nothing(layers, made):
    for _ in range(3):
        loss = layers(inputs()).sum()
        assert alive(made) == 4
        loss.backward()
        assert alive(made) == 0
        step(layers, 0)
    assert len(made) == 12


def test_one_batch_a_step_after_steps_with_several_leaves_nothing_from_the_second_on(layers, made):
    step(layers, 2)
    step(layers, 2)
    step(layers, 1)
    layers(inputs()).sum().backward()
    assert alive(made) == 0


@pytest.mark.parametrize("rate", [0, 1e-2])
def test_steps_that_change_nothing_are_not_taken_for_micro_batches(layers, made, rate):
    for _ in range(3):
        step(layers, 1, rate=rate)
    layers(inputs()).sum().backward()
    assert alive(made) == 0


def test_what_no_backward_pass_holds_goes_with_its_forward_however_many_micro_batches(layers, made):
    """The first layer's gate_up_proj, whose input needs no gradient."""
    for _ in range(3):
        loss = layers(inputs(False)).sum()
        assert alive(made) == 3
        loss.backward()
    assert alive(made) == 3
    assert len(made) == 3 + 4 + 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_has_one_layers_copy_at_a_time(layers, made, mode):
    most = []
    layers[1].register_forward_pre_hook(lambda *_: most.append(alive(made)))
    step(layers, 2)
    most.clear()
    with mode():
        for _ in range(2):
            layers(inputs())
    assert most == [0, 0]
    assert alive(made) == 0


def test_an_evaluation_between_micro_batches_finds_what_is_kept_and_leaves_it(layers, made):
    step(layers, 2)

    def with_evaluation():
        layers(inputs()).sum().backward()
        with torch.no_grad():
            layers(inputs())
        layers(inputs()).sum().backward()

    assert computed(made, with_evaluation) == 4
    step(layers, 0)
    assert alive(made) == 0


def test_an_evaluation_before_a_step_is_no_micro_batch(layers, made):
    for _ in range(3):
        with torch.no_grad():
            layers(inputs())
        layers(inputs()).sum().backward()
        assert alive(made) == 0
        step(layers, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_has_one_layers_copy_at_a_time(layers, made, reentrant):
    most, plain = [], copy.deepcopy(layers)
    detach(plain)
    prepare(plain, QATConfig(keep="nothing"))
    layers[0].register_forward_pre_hook(lambda *_: most.append(alive(made)))

    def checkpointed(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    for _ in range(2):
        for _ in range(3):
            x = inputs()
            checkpointed(x).sum().backward()
            assert alive(made) == 0
            plain(x.detach().requires_grad_()).sum().backward()
        assert all(map(torch.equal, *([p.grad for p in each.parameters()] for each in (layers, plain))))
        step(layers, 0)
        step(plain, 0)
    assert max(most) <= 2


def test_frozen_experts_are_computed_twice_for_all_steps(layers, made):
    layers.requires_grad_(False)
    for _ in range(4):
        layers(inputs()).sum().backward()
    assert len(made) == 8


def test_a_forward_that_fails_leaves_nothing(layers, made):
    with pytest.raises(RuntimeError):
        layers(torch.randn(3, 4, 5))
    assert alive(made) == 0


def test_saved_tensors_that_go_elsewhere_are_not_held_here(layers, made):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda packed: packed):
        loss = layers(inputs()).sum()
    held = alive(made)
    loss.backward()
    step(layers, 0)
    assert (held, alive(made)) == (0, 0)


class OneByOne(Experts):
    def forward(self, x):
        pairs = [(self.gate_up_proj[expert], self.down_proj[expert]) for expert in range(2)]
        gates = [(x[k] @ gate_up.mT).chunk(2, -1) for k, (gate_up, _) in enumerate(pairs)]
        return torch.stack([nn.functional.silu(gate) * up @ pairs[k][1].mT for k, (gate, up) in enumerate(gates)])


def test_a_wrapped_forward_that_looks_weights_up_for_every_expert_computes_them_once(made):
    layer = OneByOne()
    layer.forward = functools.partial(OneByOne.forward, layer)
    model = nn.Sequential(layer)
    prepare(model)
    assert [computed(made, lambda: step(model, 4)) for _ in range(2)] == [4, 2]
    with torch.no_grad():
        assert computed(made, lambda: model(inputs())) == 2
    assert alive(made) == 0
