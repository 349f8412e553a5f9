"""A quantised checkpoint becomes masters, is trained and goes back into its own encodings; what was not trained stays."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import kconvert
from kconvert.address import open_checkpoint
from kconvert.errors import KconvertError
from kconvert.models.model import understand
from kconvert.targets.sample import SampleRecipe, plan_synthetic
from kconvert_qat import QATConfig, export, prepare
from kconvert_qat.attach import attached_to
from kconvert_qat.names import check_grid

SIZES = {"layers": 3, "experts": 4, "hidden": 128, "moe_intermediate": 64, "vocab": 128, "heads": 4}
SHAPED = {"kimi-k3": ("mxfp4", {"intermediate": 128}), "deepseek-v4": ("mxfp4", {})}


class Tree(nn.Module):
    """Modules by the names of a checkpoint's tensors; the experts of a layer in a ModuleList, with a Linear for each matrix."""

    def add(self, path, tensor, in_expert=False):
        name, _, rest = path.partition(".")
        if not rest:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        elif in_expert:
            linear = nn.Linear(*tensor.shape[::-1], bias=False, device="meta")
            linear.weight = nn.Parameter(tensor)
            self.add_module(name, linear)
        elif name == "experts":
            number, _, rest = rest.partition(".")
            experts = self._modules.setdefault(name, nn.ModuleList())
            experts.extend(Tree() for _ in range(int(number) + 1 - len(experts)))
            experts[int(number)].add(rest, tensor, True)
        else:
            self._modules.setdefault(name, Tree()).add(rest, tensor)


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture(scope="module", params=list(SHAPED))
def native(request, tmp_path_factory):
    """The sample, and its grid."""
    root = tmp_path_factory.mktemp(request.param)
    grid, more = SHAPED[request.param]
    kconvert.convert(plan_synthetic(SampleRecipe(request.param, {**SIZES, **more})), root / "native")
    kconvert.convert(kconvert.plan(root / "native", kconvert.Recipe("bf16")), root / "bf16")
    return root, grid


def load(folder):
    tree = Tree()
    for name, tensor in tensors_of(folder).items():
        tree.add(name, tensor)
    return tree


def test_what_was_not_trained_goes_back_unchanged_and_what_was_is_what_training_saw(native, tmp_path):
    root, grid = native
    model = load(root / "bf16")
    covered = prepare(model, QATConfig(grid=grid))
    check_grid(open_checkpoint(root / "native").config, covered.config, covered.matrices)
    trained = covered.matrices[0]
    linear = trained.weight.module
    (linear(torch.ones(1, linear.in_features).bfloat16()) * 3).sum().backward()
    torch.optim.SGD([linear.weight], lr=1e-2).step()
    export(model, tmp_path / "back", source=root / "native")
    before, after = tensors_of(root / "native"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same(before[name], after[name])}
    assert any(name.startswith(f"{trained.name}.") for name in changed)
    experts = {name for name in changed if any(name.startswith(f"{matrix.name}.") for matrix in covered.matrices)}
    assert all(name.startswith(f"{trained.name}.") for name in experts)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((root / "native" / "config.json").read_text())
    kconvert.convert(kconvert.plan(tmp_path / "back", kconvert.Recipe("bf16")), tmp_path / "bf16")
    masters, values = tensors_of(root / "bf16"), tensors_of(tmp_path / "bf16")
    served = attached_to(linear).serve(linear, "weight").detach()
    assert not same(masters[f"{trained.name}.weight"], served)
    masters[f"{trained.name}.weight"] = served
    # The sample's FP8 has blocks with room for a smaller scale, which is as exact.
    assert all(same(masters[name], values[name]) for name in masters)


def test_another_grid_than_the_checkpoint_declares_is_refused(native):
    root, grid = native
    config = open_checkpoint(root / "native").config
    model = load(root / "bf16")
    covered = prepare(model, QATConfig(grid="nvfp4"))
    with pytest.raises(KconvertError, match=f"as {grid}, but the QAT grid is nvfp4"):
        check_grid(config, covered.config, covered.matrices)


@pytest.mark.parametrize(
    ("grid", "convention", "recipe"),
    [
        ("mxfp4", "compressed-tensors", kconvert.Recipe("mxfp4")),
        ("nvfp4", "power-of-two", kconvert.Recipe("nvfp4")),
        ("fp8-block", "f32", kconvert.Recipe("fp8")),
        ("fp8-block", "ue8m0", kconvert.Recipe("fp8", scales="ue8m0")),
    ],
)
def test_an_export_has_the_tensors_that_a_conversion_of_the_masters_writes(tiny, tmp_path, grid, convention, recipe):
    model = tiny("qwen")
    covered = prepare(model, QATConfig(grid=grid, convention=convention))
    export(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "masters")
    kconvert.convert(kconvert.plan(tmp_path / "masters", recipe), tmp_path / "converted")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "converted")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)
    declared = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("ours", "converted")
    ]
    kept = [set(table.pop("modules_to_not_convert", ())) for table in declared]
    assert declared[0] == declared[1]
    assert kept[0] == kept[1]
    kconvert.convert(kconvert.plan(tmp_path / "ours", kconvert.Recipe("bf16")), tmp_path / "bf16")
    values = tensors_of(tmp_path / "bf16")
    for matrix in covered.matrices:
        served = attached_to(matrix.weight.module).serve(matrix.weight.module, matrix.weight.parameter)
        assert same(values[f"{matrix.name}.weight"], matrix.of(served).detach().contiguous())
    assert {
        w.format.quantised for w in understand(open_checkpoint(tmp_path / "ours")).weights if "experts" in w.name
    } == {True}
