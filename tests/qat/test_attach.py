"""Attaching: every layout, nothing but the experts, and with what people train with."""

import copy

import pytest
import torch
from torch import nn

from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, at_step, coverage, detach, export, prepare
from kconvert_qat.experts import find_experts
from kconvert_qat.grid import fake_quantise


def quantised(model, group=32, convention="kimi"):
    """A copy whose expert weights are the grid's values, by hand."""
    model = copy.deepcopy(model)
    for weight in find_experts(model):
        data = weight.tensor.data
        served = fake_quantise(data.mT if weight.transposed else data, group, convention)
        data.copy_(served.mT if weight.transposed else served)
    return model


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_prepared_model_computes_what_the_quantised_one_does(tiny, family, ids, implementation):
    model = tiny(family)
    model.set_experts_implementation(implementation)
    before, wanted = model(ids).logits, quantised(model)(ids).logits
    prepare(model)
    assert torch.equal(model(ids).logits, wanted)
    assert not torch.equal(wanted, before)
    detach(model)
    assert torch.equal(model(ids).logits, before)
    assert "FakeQuantised" not in repr(model)


def test_all_experts_are_covered_and_nothing_else(tiny, family):
    model = tiny(family)
    covered = prepare(model)
    stacks = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 3)
    assert covered.parameters == stacks
    assert covered.parameters == sum(matrix.weight.shape[0] * matrix.weight.shape[1] for matrix in covered.matrices)
    changed = [name for name, module in model.named_modules() if type(module).__name__.startswith("FakeQuantised")]
    assert changed
    assert all(name.endswith("mlp.experts") for name in changed)


def test_the_gradients_are_those_of_the_quantised_model(tiny, family, ids):
    model = tiny(family)
    wanted = quantised(model)
    prepare(model)
    for each in (model, wanted):
        each(ids).logits.float().square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_a_step_of_the_optimiser_shows_in_the_next_forward(tiny, ids):
    model = tiny(dtype=torch.float32)
    prepare(model)
    first = model(ids).logits
    first.square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    detached = copy.deepcopy(model)
    detach(detached)
    assert torch.equal(model(ids).logits, quantised(detached)(ids).logits)
    assert not torch.equal(model(ids).logits, first)


def test_a_module_list_is_quantised_linear_by_linear(module_list):
    x = torch.randn(5, 64).bfloat16()
    wanted = quantised(module_list)(x)
    covered = prepare(module_list)
    assert len(covered.matrices) == 9
    assert torch.equal(module_list(x), wanted)
    assert type(module_list.gate) is nn.Linear


def test_fused_transposed_and_single_matrices_are_quantised_alike(tiny):
    """The same matrices in the three layouts get the same values."""
    torch.manual_seed(0)
    matrices = torch.randn(4, 64, 64).bfloat16()
    wanted = torch.stack([fake_quantise(matrix, 32, "kimi") for matrix in matrices])
    for name in ("deepseek", "gpt-oss"):
        model = tiny(name)
        weight = next(weight for weight in find_experts(model) if weight.parameter == "gate_up_proj")
        for expert in range(4):
            for k, piece in enumerate(weight.pieces):
                weight.matrix(weight.tensor.data, expert, piece).copy_(matrices[expert, 32 * k : 32 * k + 32])
        served = quantised(model)
        found = next(other for other in find_experts(served) if other.key == weight.key)
        for expert in range(4):
            for k, piece in enumerate(weight.pieces):
                assert torch.equal(found.matrix(found.tensor, expert, piece), wanted[expert, 32 * k : 32 * k + 32])


def test_fake_quantisation_starts_at_its_step(tiny, ids):
    model = tiny()
    before = model(ids).logits
    prepare(model, QATConfig(start_step=3))
    assert not at_step(model, 2)
    assert torch.equal(model(ids).logits, before)
    assert at_step(model, 3)
    assert not torch.equal(model(ids).logits, before)


def test_targets_choose_roles_and_layers(tiny):
    model = tiny("qwen")
    covered = prepare(model, QATConfig(targets=("expert.down",)))
    assert {matrix.piece for matrix in covered.matrices} == {"down"}
    detach(model)
    covered = prepare(model, QATConfig(targets=("model.layers.1.*",)))
    assert {matrix.name.split(".")[2] for matrix in covered.matrices} == {"1"}
    detach(model)
    with pytest.raises(KconvertError, match="one parameter"):
        prepare(model, QATConfig(targets=("expert.up",)))
    with pytest.raises(KconvertError, match="none of the model's experts"):
        prepare(model, QATConfig(targets=("no.such",)))


def test_a_model_without_experts_is_refused():
    with pytest.raises(KconvertError, match="no routed experts"):
        prepare(nn.Sequential(nn.Linear(64, 64)))


def test_experts_that_do_not_say_how_they_lie_are_refused(tiny):
    model = tiny()
    del model.model.layers[1].mlp.experts.is_transposed
    with pytest.raises(KconvertError, match="does not say how"):
        prepare(model)


def test_missing_experts_are_refused(tiny):
    model = tiny("qwen")
    model.config.num_hidden_layers = 3
    with pytest.raises(KconvertError, match="which its configuration demands"):
        prepare(model)


@pytest.mark.parametrize(("group", "message"), [(48, "do not divide into groups of 48")])
def test_a_group_size_that_does_not_fit_is_refused_and_changes_nothing(tiny, group, message):
    model = tiny()
    with pytest.raises(KconvertError, match=message):
        prepare(model, QATConfig(group_size=group))
    with pytest.raises(KconvertError, match="not prepared"):
        coverage(model)


def test_preparing_twice_is_refused(tiny):
    model = tiny()
    prepare(model)
    with pytest.raises(KconvertError, match="prepared already"):
        prepare(model)


def test_a_deep_copy_is_prepared_and_independent(tiny, ids):
    model = tiny()
    prepare(model, QATConfig(start_step=1))
    twin = copy.deepcopy(model)
    at_step(model, 1)
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    at_step(twin, 1)
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_saving_and_loading_keep_keys_and_weights(tiny, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny()
    keys, before = list(model.state_dict()), model(ids).logits
    prepare(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(loaded(ids).logits, before)


def test_gradient_checkpointing_gives_the_same_gradients(tiny, ids):
    plain, saving = tiny(), tiny()
    for model in (plain, saving):
        prepare(model)
        model.train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(ids, use_cache=False).logits.float().square().mean().backward()
    for mine, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_torch_compile_takes_the_experts_in_one_graph(tiny):
    model = tiny()
    model.set_experts_implementation("grouped_mm")
    prepare(model)
    experts = model.model.layers[1].mlp.experts
    inputs = torch.randn(6, 64).bfloat16(), torch.arange(12).view(6, 2) % 4, torch.rand(6, 2).bfloat16()
    wanted = experts(*inputs)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), wanted)


def test_experts_without_a_gate_are_covered():
    class Ungated(nn.Module):
        is_transposed, is_concatenated, has_gate, has_bias = False, True, False, False

        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = (nn.Parameter(torch.randn(2, *shape)) for shape in ((32, 64), (64, 32)))

        def forward(self, x):
            return torch.relu(x @ self.up_proj.mT) @ self.down_proj.mT

    model = nn.ModuleDict({"experts": Ungated()})
    x = torch.randn(2, 5, 64)
    wanted = quantised(model)["experts"](x)
    assert [matrix.name for matrix in prepare(model).matrices][::2] == ["experts.0.up_proj", "experts.0.down_proj"]
    assert torch.equal(model["experts"](x), wanted)


def fewer(weight):
    return weight[:2].clone()


def more(weight):
    return torch.cat([weight, weight])


def flat(weight):
    return weight[0].clone()


def scalar(weight):
    return weight.new_zeros(())


def transposed(weight):
    return weight.mT.contiguous()


def sparse(weight):
    return weight.float().to_sparse()


@pytest.mark.parametrize("swap", [fewer, more, flat, scalar, transposed, sparse, torch.Tensor.half, torch.Tensor.byte])
def test_a_parameter_swapped_after_prepare_is_one_sentence_in_the_forward_and_the_export(tiny, ids, tmp_path, swap):
    model = tiny("qwen")
    prepare(model)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(swap(experts.down_proj.detach()), requires_grad=False)
    for use in (lambda: model(ids), lambda: coverage(model), lambda: export(model, tmp_path / "out")):
        with pytest.raises(KconvertError, match=r"layers\.1\.mlp\.experts\.down_proj (is|has) ") as said:
            use()
        assert "\n" not in str(said.value)
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_is_gone_is_one_sentence(tiny, ids):
    model = tiny("qwen")
    prepare(model)
    del model.model.layers[1].mlp.experts.down_proj
    with pytest.raises(KconvertError, match=r"layers\.1\.mlp\.experts\.down_proj has no dense matrices"):
        model(ids)


def test_a_model_without_values_is_not_exported(tiny, tmp_path):
    model = tiny("qwen")
    prepare(model)
    model.lm_head.to("meta")
    with pytest.raises(KconvertError, match=r"lm_head\.weight is on the meta device"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
