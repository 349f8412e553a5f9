"""With PEFT's LoRA, in both modes and in either order."""

import pytest
import torch

from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, coverage, export, prepare
from kconvert_qat.experts import find_experts
from kconvert_qat.grid import fake_quantise

peft = pytest.importorskip("peft")
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapt(model, **options):
    """A PEFT model whose adapters change something; in F32, where sums are in the same order on both sides."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options))
    return adapted.eval()


def merged_by_hand(model, ids):
    """Logits of the model whose experts are FQ(W + dW), by PEFT's own merge."""
    model = model.merge_and_unload()
    with torch.no_grad():
        for weight in find_experts(model):
            weight.tensor.data.copy_(fake_quantise(weight.tensor.data, 32, "kimi"))
    return model(ids).logits


@pytest.mark.parametrize("prepare_first", [True, False])
def test_merged_quantises_the_sum_of_fused_experts_and_adapters(tiny, ids, prepare_first):
    model = tiny(dtype=torch.float32)
    if prepare_first:
        prepare(model)
        model = adapt(model, target_parameters=FUSED)
    else:
        model = adapt(model, target_parameters=FUSED)
        prepare(model)
    logits = model(ids).logits
    wanted = merged_by_hand(adapt(tiny(dtype=torch.float32), target_parameters=FUSED), ids)
    plain = adapt(tiny(dtype=torch.float32), target_parameters=FUSED)(ids).logits
    assert (logits - wanted).norm() < 0.05 * (plain - wanted).norm()
    assert len(coverage(model).matrices) == 12


@pytest.mark.parametrize("prepare_first", [True, False])
def test_unmerged_quantises_the_weight_and_adds_the_adapter(tiny, ids, prepare_first):
    config = QATConfig(lora="unmerged")
    model = tiny(dtype=torch.float32)
    if prepare_first:
        prepare(model, config)
        model = adapt(model, target_parameters=FUSED)
    else:
        model = adapt(model, target_parameters=FUSED)
        prepare(model, config)
    base = tiny(dtype=torch.float32)
    for weight in find_experts(base):
        weight.tensor.data.copy_(fake_quantise(weight.tensor.data, 32, "kimi"))
    wanted = adapt(base, target_parameters=FUSED)(ids).logits
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_linears_of_a_module_list(module_list, mode):
    model = adapt(module_list.float(), target_modules=["gate_proj", "up_proj", "down_proj"])
    layer = model.base_model.model.experts[0].gate_proj
    weight, delta, x = layer.get_base_layer().weight, layer.get_delta_weight("default"), torch.randn(5, 64)
    prepare(model, QATConfig(lora=mode))
    quantised = (
        fake_quantise(weight + delta, 32, "kimi") if mode == "merged" else fake_quantise(weight, 32, "kimi") + delta
    )
    torch.testing.assert_close(layer(x), x @ quantised.T)


def test_an_adapter_that_comes_too_late_is_noticed(module_list):
    prepare(module_list)
    model = adapt(module_list, target_modules=["gate_proj"])
    with pytest.raises(KconvertError, match="add it before"):
        coverage(model)


def test_only_the_adapters_learn(tiny, ids):
    model = adapt(tiny(dtype=torch.float32), target_parameters=FUSED)
    prepare(model)
    model(ids).logits.square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning
    assert all("lora_" in name for name in learning)


def test_an_export_asks_for_the_merge_first(tiny, ids, tmp_path):
    model = adapt(tiny(dtype=torch.float32), target_parameters=FUSED)
    prepare(model)
    with pytest.raises(KconvertError, match="merge_and_unload"):
        export(model, tmp_path / "int4")
    export(model.merge_and_unload(), tmp_path / "int4")
    assert (tmp_path / "int4" / "config.json").exists()
