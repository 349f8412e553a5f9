"""Once a step: what a weight is served as is computed once for each of its versions, and is never stale."""

import copy
import pickle
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, at_step, detach, prepare
from kconvert_qat.experts import find_experts
from kconvert_qat.grid import fake_quantise
from kconvert_qat.grids import fingerprints, kept, serving
from kconvert_qat.grids.fingerprints import fingerprint
from kconvert_qat.grids.kept import Kept, version_of


@pytest.fixture
def computed(monkeypatch):
    """The shapes of all that is computed, in order."""
    shapes = []
    for name in ("fake_quantise", "encode"):
        real = getattr(serving, name)

        def counting(weight, *args, real=real):
            shapes.append(tuple(weight.shape))
            return real(weight, *args)

        monkeypatch.setattr(serving, name, counting)
    return shapes


def by_hand(model):
    """A copy, not prepared, whose experts are the grid's values of what the model's are now."""
    model = copy.deepcopy(model)
    detach(model)
    for weight in find_experts(model):
        data = weight.tensor.data
        served = fake_quantise(data.mT if weight.transposed else data, 32, "kimi")
        data.copy_(served.mT if weight.transposed else served)
    return model


def first_expert(model):
    return find_experts(model)[0].tensor


@pytest.mark.parametrize("keep", ["served", "codes"])
def test_micro_batches_checkpointing_and_evaluation_compute_the_grid_once_a_step(tiny, family, ids, computed, keep):
    model = tiny(family, dtype=torch.float32)
    weights = len(prepare(model, QATConfig(keep=keep)).weights)
    model.gradient_checkpointing_enable()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(2):
        at_step(model, step)
        model.train()
        for batch in ids:
            model(batch[None], use_cache=False).logits.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        assert len(computed) == weights * (step + 1)
    model.eval()
    wanted = by_hand(model)(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, wanted)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)
    assert len(computed) == weights * 3


@pytest.mark.parametrize("keep", ["backward", "served", "codes"])
def test_training_is_the_same_to_the_bit_whatever_is_kept(tiny, family, ids, keep):
    def trained(keep):
        model = tiny(family, dtype=torch.float32)
        prepare(model, QATConfig(keep=keep))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            for batch in ids:
                model(batch[None]).logits.square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, trained(keep), trained("nothing")))


def in_place(weight):
    with torch.no_grad():
        weight.mul_(1.5)


def through_data(weight):
    weight.data.mul_(1.5)


def through_one_value_of_data(weight):
    weight.data.view(-1)[777] += 3


def through_other_data(weight):
    weight.data = weight.data * 1.5


def through_numpy(weight):
    weight.detach().numpy()[...] *= 1.5


def through_a_view(weight):
    weight.detach()[1].neg_()


def through_preserved_version(weight):
    """As FSDP2 gathers."""
    with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
        weight.copy_(weight * 1.5)


def by_negation(weight):
    weight.data.neg_()


def by_swapping_experts(weight):
    weight.data.copy_(weight.data.flip(0).clone())


def by_an_optimiser(weight, kind=torch.optim.AdamW, **options):
    weight.grad = torch.ones_like(weight)
    kind([weight], lr=1e-2, **options).step()
    weight.grad = None


def by_the_optimisers_loop(weight):
    by_an_optimiser(weight, foreach=False)


def by_the_optimisers_lists(weight):
    by_an_optimiser(weight, foreach=True)


def by_the_fused_optimiser(weight):
    by_an_optimiser(weight, fused=True)


WAYS = [
    in_place,
    through_data,
    through_one_value_of_data,
    through_other_data,
    through_numpy,
    through_a_view,
    through_preserved_version,
    by_negation,
    by_swapping_experts,
    by_the_optimisers_loop,
    by_the_optimisers_lists,
    by_the_fused_optimiser,
]


@pytest.mark.parametrize("keep", ["backward", "served", "codes"])
@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
def test_a_weight_that_changed_is_seen(tiny, ids, change, keep):
    model = tiny(dtype=torch.float32)
    prepare(model, QATConfig(keep=keep))
    for _ in range(2):  # so that it is kept
        before = model(ids).logits
    change(first_expert(model))
    wanted = by_hand(model)(ids).logits
    assert torch.equal(model(ids).logits, wanted)
    assert not torch.equal(wanted, before)


def test_another_parameter_in_its_place_and_loaded_weights_are_seen(tiny, ids):
    model, other = tiny(), tiny(seed=1)
    prepare(model)
    model(ids)
    weight = find_experts(model)[0]
    setattr(weight.module, weight.parameter, nn.Parameter(find_experts(other)[0].tensor.detach().clone()))
    assert torch.equal(model(ids).logits, by_hand(model)(ids).logits)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(ids).logits, by_hand(model)(ids).logits)
    state = tiny(seed=2).state_dict()
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(ids).logits, by_hand(model)(ids).logits)


def test_a_parameter_that_the_grid_cannot_have_is_refused_in_the_next_forward(tiny, ids):
    model = tiny()
    prepare(model)
    weight = find_experts(model)[0]
    for swapped, message in (
        (torch.randn(4, 64, 40), "40 inputs, which do not divide"),
        (torch.randn(4, 64, 64).half(), "float16"),
    ):
        setattr(weight.module, weight.parameter, nn.Parameter(swapped))
        with pytest.raises(KconvertError, match=message):
            model(ids)


def test_a_copy_has_what_is_its_own(tiny, ids, computed):
    model = tiny()
    weights = len(prepare(model, QATConfig(keep="served")).weights)
    before = model(ids).logits
    twin = copy.deepcopy(model)
    in_place(first_expert(twin))
    computed.clear()
    assert torch.equal(twin(ids).logits, by_hand(twin)(ids).logits)
    assert len(computed) == weights  # nothing was copied
    assert torch.equal(model(ids).logits, before)
    assert len(computed) == weights


def test_what_is_kept_is_not_saved_with_the_model(tiny, ids):
    model = tiny()
    prepare(model)
    size = len(pickle.dumps(model.model.layers[1].mlp.experts.__dict__["_kconvert_qat"]))
    model(ids)
    assert len(pickle.dumps(model.model.layers[1].mlp.experts.__dict__["_kconvert_qat"])) < size + 1000


def test_what_somebody_wrote_into_is_computed_again(tiny, ids):
    model = tiny()
    prepare(model, QATConfig(keep="served"))
    before = model(ids).logits
    experts = model.model.layers[1].mlp.experts
    attached = experts.__dict__["_kconvert_qat"]
    with torch.no_grad():
        attached.serve(experts, "gate_up_proj").zero_()
    assert torch.equal(model(ids).logits, before)


def test_frozen_experts_are_computed_once_for_all_steps(tiny, ids, computed):
    model = tiny()
    weights = prepare(model, QATConfig(keep="served")).weights
    for weight in weights:
        weight.tensor.requires_grad_(False)
    optimiser = torch.optim.SGD(model.lm_head.parameters(), lr=1e-2)
    for step in range(3):
        at_step(model, step)
        model(ids).logits.square().mean().backward()
        optimiser.step()
    assert len(computed) == len(weights)


def held_of(model):
    """What is kept of the experts of each module."""
    found = (module.__dict__.get("_kconvert_qat") for module in model.modules())
    return [kept._held for attached in found if attached for kept in attached.kept.values()]


@pytest.mark.parametrize("keep", ["served", "codes"])
def test_what_is_kept_of_trained_experts_is_let_go_of_before_the_optimiser_takes_memory(tiny, ids, keep):
    model, seen = tiny(dtype=torch.float32), []
    weights = len(prepare(model, QATConfig(keep=keep)).weights)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimiser.register_step_pre_hook(lambda *_: seen.append(held_of(model)))
    for batch in ids:
        model(batch[None]).logits.square().mean().backward()
    with torch.no_grad():
        model(ids)
    assert None not in held_of(model)
    optimiser.step()
    assert seen == [[None] * weights]
    assert torch.equal(model.eval()(ids).logits, by_hand(model)(ids).logits)


def test_merged_adapters_are_seen_at_every_step_and_kept_between(tiny, ids, computed):
    peft = pytest.importorskip("peft")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = tiny(dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=targets, init_lora_weights=False))
    weights = len(prepare(adapted, QATConfig(keep="served")).weights)
    for _ in range(2):
        computed.clear()
        for batch in ids:
            adapted(batch[None]).logits.square().mean().backward()
        assert len(computed) == weights
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-0.1)
                parameter.grad = None
    adapted.eval()
    first = adapted(ids).logits
    assert torch.equal(copy.deepcopy(adapted)(ids).logits, first)


def test_a_compiled_model_is_never_stale(tiny):
    model = tiny()
    model.set_experts_implementation("grouped_mm")
    prepare(model)
    experts = model.model.layers[1].mlp.experts
    inputs = torch.randn(6, 64).bfloat16(), torch.arange(12).view(6, 2) % 4, torch.rand(6, 2).bfloat16()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), experts(*inputs))
    for change in (in_place, through_data):
        change(experts.gate_up_proj)
        assert torch.equal(compiled(*inputs), experts(*inputs))


def test_an_unknown_thing_to_keep_is_refused():
    with pytest.raises(KconvertError, match="keep is 'all', but it must be one of backward, served, codes, nothing"):
        QATConfig(keep="all")


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8191, 8192, 8193, 3 * 8192, 2 * 8192 * 1024 + 5])
def test_a_fingerprint_is_of_every_byte_wherever_it_lies(size):
    weight = torch.arange(size).mul(37).to(torch.uint8)
    before = fingerprint(weight)
    assert fingerprint(weight.clone()) == before
    for place in {0, size // 3, size // 2, size - 1} if size else ():
        for bit in (1, 128):
            weight[place] ^= bit
            assert fingerprint(weight) != before
            weight[place] ^= bit
    assert (
        fingerprint(torch.cat([weight, torch.zeros(1, dtype=torch.uint8)])) != before
    )  # what blocks are filled up with


def test_a_fingerprint_is_of_how_a_tensor_lies_in_memory_and_needs_no_copy_of_a_transposed_one():
    weight = torch.randn(3, 64, 64)
    different = {fingerprint(each) for each in (weight, weight.mT, weight.mT.contiguous(), weight.view(torch.int32))}
    assert len(different) == 4
    assert fingerprint(weight.mT[:, ::2]) == fingerprint(weight.clone().mT[:, ::2])


def test_blocks_are_hashed_by_nh_under_keys_of_this_process():
    from kconvert_qat.grids import kernels

    words = np.random.default_rng(0).integers(0, 2**32, (3, 2, fingerprints.HALF), np.uint32)
    words[2] = 2**32 - 1
    found = np.empty((3, 2), np.uint64)
    kernels.nh(words, fingerprints.KEYS, found)
    keys = fingerprints.KEYS.tolist()
    for block, hashes in zip(words.tolist(), found.tolist(), strict=True):
        for shift in (0, 1):
            pairs = [
                (left + keys[0][i + shift]) % 2**32 * ((right + keys[1][i + shift]) % 2**32)
                for i, (left, right) in enumerate(zip(*block, strict=True))
            ]
            assert hashes[shift] == sum(pairs) % 2**64


def test_the_version_of_a_weight_is_all_of_its_bits():
    weight = torch.randn(4, 64, 64)
    before = version_of(weight, 0)
    assert version_of(weight.clone(), 5) == before
    assert version_of(weight.view(4, 32, 128), 0) != before
    assert version_of(torch.zeros(2, 64), 0) != version_of(-torch.zeros(2, 64), 0)
    for flat in (0, 4097, weight.numel() - 1):
        changed = weight.clone()
        changed.view(-1)[flat] *= -1
        assert version_of(changed, 0) != before
    assert version_of(weight.roll(64 * 64), 0) != before


def test_the_version_of_a_weight_on_another_device_is_the_parameter_itself_while_others_are_alive():
    one, other = (nn.Parameter(torch.empty(4, 64, 64, device="meta")) for _ in range(2))
    assert version_of(one, 0) == version_of(one, 0)
    assert version_of(one, 0) != version_of(other, 0)
    assert version_of(one, 0) != version_of(one, 1)


def test_a_thread_that_asks_while_another_one_makes_the_next_version_gets_that_version(monkeypatch):
    values, of = [torch.tensor(0.0), torch.tensor(1.0)], Kept("served")
    of.get(0, True, lambda: values[0])
    seen = []

    def reference(made):
        if not seen:  # as if another thread ran in between
            seen.append(None)
            seen.append(of.get(1, True, lambda: values[1]))
        return weakref.ref(made)

    monkeypatch.setattr(kept, "weakref", SimpleNamespace(ref=reference))
    assert of.get(1, True, lambda: values[1]) is values[1]
    assert seen[1] is values[1]


@pytest.mark.parametrize("keep", ["nothing", "backward", "served", "codes"])
def test_a_batch_may_be_mapped_over(tiny, keep):
    model = tiny("qwen", dtype=torch.float32)
    model.set_experts_implementation("eager")
    prepare(model, QATConfig(keep=keep))
    down = model.model.layers[1].mlp.experts
    attached = down.__dict__["_kconvert_qat"]
    inputs = torch.randn(3, 5, 32)

    def one(x):
        return x[:, None] * attached.serve(down, "down_proj")[0]

    assert torch.equal(torch.func.vmap(one)(inputs), torch.stack([one(x) for x in inputs]))
