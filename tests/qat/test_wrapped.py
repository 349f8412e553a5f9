"""Experts whose forward somebody has wrapped before `prepare` are trained on the grid like others."""

import threading

import pytest
import torch

from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, detach, export, prepare


@pytest.fixture
def hooked(tiny):
    """`hooked()` is a model with accelerate's hooks on every module, as a device_map over several devices leaves it."""

    def make(name="qwen"):
        from accelerate.hooks import ModelHook, add_hook_to_module

        model = tiny(name)
        for module in model.modules():
            add_hook_to_module(module, ModelHook())
        return model

    return make


@pytest.mark.parametrize("grid", ["int4", "nvfp4"])
def test_a_model_on_several_devices_computes_what_another_does(tiny, hooked, ids, grid):
    plain, model = tiny("qwen"), hooked()
    untrained = model(ids).logits
    for each in (plain, model):
        prepare(each, QATConfig(grid=grid))
    wanted = plain(ids).logits
    assert not torch.equal(untrained, wanted)
    for each in (plain, model):
        each(ids, labels=ids).loss.backward()
    assert torch.equal(model(ids).logits, wanted)
    gradients = dict(plain.named_parameters())
    assert all(torch.equal(p.grad, gradients[name].grad) for name, p in model.named_parameters() if p.grad is not None)


def test_its_weights_are_as_they_are_outside_of_the_forward_and_after_detach(hooked, ids, tmp_path):
    model = hooked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(ids).logits
    prepare(model)
    experts = model.model.layers[0].mlp.experts
    model(ids)
    assert torch.equal(experts.down_proj, before["model.layers.0.mlp.experts.down_proj"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    export(model, tmp_path / "int4")
    detach(model)
    assert torch.equal(model(ids).logits, logits)


def test_what_was_wrapped_after_prepare_is_unwrapped_before_detach(tiny, ids):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny("qwen")
    logits = model(ids).logits
    prepare(model)
    served = model(ids).logits
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp.experts, ModelHook())
    assert torch.equal(model(ids).logits, served)
    with pytest.raises(KconvertError, match="wrapped after prepare"):
        detach(model)
    for layer in model.model.layers:
        remove_hook_from_module(layer.mlp.experts)
    detach(model)
    assert torch.equal(model(ids).logits, logits)


def test_adapters_on_wrapped_experts_are_refused(hooked, ids):
    from peft import LoraConfig, get_peft_model

    model = hooked()
    prepare(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    with pytest.raises(KconvertError, match="has adapters on experts whose forward is wrapped"):
        adapted(ids)


def test_a_parameter_of_other_matrices_is_one_sentence(tiny, ids):
    model = tiny("qwen")
    prepare(model)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:, :32].clone())
    with pytest.raises(KconvertError, match=r"layers\.0.*is \[4, 32, 32\], but was \[4, 64, 32\] when it was prepared"):
        model(ids)


def test_experts_that_other_ranks_hold_are_refused(module_list):
    module_list.experts[1] = None
    with pytest.raises(KconvertError, match="has None for experts that other ranks hold"):
        prepare(module_list)


def test_a_thread_sees_the_grid_to_the_end_of_its_forward_whenever_others_end_theirs(tiny, ids):
    from accelerate.hooks import ModelHook, add_hook_to_module

    came, entered, left = (threading.Event() for _ in range(3))
    found = []

    class Meeting(ModelHook):
        """The first thread waits in the experts until the second is there, which waits until the first has left."""

        def pre_forward(self, module, *args, **kwargs):
            if threading.current_thread().name == "first":
                came.set()
                entered.wait(60)
            elif threading.current_thread().name == "second":
                entered.set()
                left.wait(60)
            return args, kwargs

    model = tiny("qwen")
    add_hook_to_module(model.model.layers[1].mlp.experts, Meeting())
    prepare(model)
    wanted = model(ids).logits

    def work(after):
        found.append(model(ids).logits)
        after()

    first = threading.Thread(target=work, args=(left.set,), name="first")
    second = threading.Thread(target=work, args=(lambda: None,), name="second")
    first.start()
    assert came.wait(60)
    second.start()
    first.join()
    second.join()
    assert len(found) == 2
    assert all(torch.equal(logits, wanted) for logits in found)
