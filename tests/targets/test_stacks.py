"""Experts whose matrices share a tensor are read one by one, and lie together again where the model's releases have them so."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kconvert import KconvertError, Recipe, convert, plan, verify
from kconvert.address import open_checkpoint
from kconvert.models.model import understand
from kconvert.targets.sample import SampleRecipe, plan_synthetic

EXPERTS, WIDTH, HIDDEN = 3, 128, 256
PREFIX = "model.layers.1.mlp.experts"


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def checkpoint(root, tensors, **config):
    root.mkdir()
    save_file({"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16), **tensors}, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({"model_type": "unheard_of", **config}))
    return root


def tensors_of(root):
    found = {}
    for file in root.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.fixture
def fused():
    """As transformers fuses experts."""
    return {
        f"{PREFIX}.gate_up_proj": random(EXPERTS, 2 * WIDTH, HIDDEN),
        f"{PREFIX}.down_proj": random(EXPERTS, HIDDEN, WIDTH),
    }


def matrices(fused):
    """gate, up and down of every expert."""
    for expert in range(EXPERTS):
        gate, up = fused[f"{PREFIX}.gate_up_proj"][expert].split(WIDTH)
        yield from ((f"{expert}.gate_proj", gate), (f"{expert}.up_proj", up))
        yield f"{expert}.down_proj", fused[f"{PREFIX}.down_proj"][expert]


def test_each_matrix_of_a_stack_is_a_weight_of_an_expert(tmp_path, fused):
    model = understand(open_checkpoint(checkpoint(tmp_path / "src", fused)))
    roles = {(weight.name, weight.role, weight.layer, weight.expert) for weight in model.weights}
    assert (f"{PREFIX}.2.up_proj", "expert.up", 1, 2) in roles
    assert len(roles) == 3 * EXPERTS


def test_quantised_experts_of_a_stack_are_written_one_by_one(tmp_path, fused):
    source = checkpoint(tmp_path / "src", fused)
    convert(plan(source, Recipe("fp8")), tmp_path / "fp8")
    verify(source, tmp_path / "fp8")
    written = tensors_of(tmp_path / "fp8")
    for name, values in matrices(fused):
        scale = written[f"{PREFIX}.{name}.weight_scale_inv"]
        blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        expected = (values.float() / blocks).to(torch.float8_e4m3fn)
        assert torch.equal(written[f"{PREFIX}.{name}.weight"].float(), expected.float())


def test_a_stack_that_is_copied_stays_one(tmp_path, fused):
    attention = {"model.layers.1.self_attn.q_proj.weight": random(HIDDEN, HIDDEN, dtype=torch.float8_e4m3fn)}
    scale = {"model.layers.1.self_attn.q_proj.weight_scale_inv": torch.ones(2, 2)}
    table = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = checkpoint(tmp_path / "src", {**fused, **attention, **scale}, quantization_config=table)
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    written = tensors_of(tmp_path / "dst")
    assert all(torch.equal(written[name], values) for name, values in fused.items())


def test_a_part_of_a_stack_is_written_under_the_names_of_its_matrices(tmp_path, fused):
    source = checkpoint(tmp_path / "src", fused)
    convert(plan(source, Recipe("fp8", include=("*.1.*",))), tmp_path / "dst")
    verify(source, tmp_path / "dst", include=("*.1.*",))
    assert f"{PREFIX}.1.down_proj.weight" in tensors_of(tmp_path / "dst")


def quantised(name, values, tail):
    """Codes and block scales of a stack, `name` + `tail` the scales'."""
    experts, rows, cols = values.shape
    blocks = values.float().view(experts, rows // 128, 128, cols // 128, 128)
    scale = blocks.abs().amax((2, 4)) / 448
    codes = (blocks / scale[:, :, None, :, None]).view(values.shape).to(torch.float8_e4m3fn)
    return {name: codes, name.removesuffix(".weight") + tail: scale}


def dequantised(codes, scale):
    return (codes.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)).bfloat16()


@pytest.mark.parametrize(
    ("name", "tail"), [(f"{PREFIX}.{{}}", "_scale_inv"), (f"{PREFIX}.{{}}.weight", ".weight_scale_inv")]
)
def test_a_stack_in_fp8_becomes_one_in_bf16(tmp_path, fused, name, tail):
    tensors = {}
    for word in ("gate_up_proj", "down_proj"):
        tensors |= quantised(name.format(word), fused[f"{PREFIX}.{word}"], tail)
    table = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = checkpoint(tmp_path / "src", tensors, quantization_config=table)
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    written = tensors_of(tmp_path / "dst")
    for word in ("gate_up_proj", "down_proj"):
        codes, scale = tensors[name.format(word)], tensors[f"{PREFIX}.{word}{tail}"]
        assert torch.equal(written[name.format(word)], dequantised(codes, scale))
    assert len(written) == 3


def test_scales_in_a_stack_belong_to_codes_that_lie_apart(tmp_path, fused):
    """As transformers saves what it quantises by itself."""
    tensors = {}
    for word in ("gate_up_proj", "down_proj"):
        codes, scale = quantised(word, fused[f"{PREFIX}.{word}"], "_scale_inv").values()
        tensors[f"{PREFIX}.{word}_scale_inv"] = scale
        for expert in range(EXPERTS):
            halves = codes[expert].split(WIDTH) if word == "gate_up_proj" else [codes[expert]]
            names = ("gate_proj", "up_proj") if word == "gate_up_proj" else ("down_proj",)
            tensors |= {f"{PREFIX}.{expert}.{n}.weight": half.clone() for n, half in zip(names, halves, strict=True)}
    table = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = checkpoint(tmp_path / "src", tensors, quantization_config=table)
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    written = tensors_of(tmp_path / "dst")
    scale = tensors[f"{PREFIX}.gate_up_proj_scale_inv"]
    expected = dequantised(tensors[f"{PREFIX}.2.up_proj.weight"][None], scale[2:, 1:])[0]
    assert torch.equal(written[f"{PREFIX}.2.up_proj.weight"], expected)


@pytest.mark.parametrize("lost", ["0.gate_proj", "2.up_proj"])
def test_a_matrix_that_is_missing_beside_scales_in_a_stack_is_named(tmp_path, lost):
    names = [f"{expert}.{word}" for expert in range(EXPERTS) for word in ("gate_proj", "up_proj")]
    codes = random(WIDTH, HIDDEN, dtype=torch.float8_e4m3fn)
    tensors = {f"{PREFIX}.{name}.weight": codes.clone() for name in names if name != lost}
    tensors[SCALE] = torch.ones(EXPERTS, 2, 2)
    source = checkpoint(tmp_path / "src", tensors, quantization_config=FP8)
    with pytest.raises(KconvertError, match=f"experts.{lost}' cannot be read: it has no weight, but weight_scale_inv"):
        plan(source, Recipe("bf16"))


def test_a_scale_for_each_expert_is_that_of_gate_and_up(tmp_path, fused):
    tensors = {name: values.to(torch.float8_e4m3fn) for name, values in fused.items()}
    scales = {f"{name}_scale": torch.arange(1.0, EXPERTS + 1) / 4 for name in fused}
    table = {"quant_method": "fp8"}
    source = checkpoint(tmp_path / "src", {**tensors, **scales}, quantization_config=table)
    convert(plan(source, Recipe("bf16")), tmp_path / "dst")
    verify(source, tmp_path / "dst")
    written = tensors_of(tmp_path / "dst")
    for name, codes in tensors.items():
        assert torch.equal(written[name], (codes.float() * scales[f"{name}_scale"][:, None, None]).bfloat16())


def test_transposed_stacks_are_left_as_they_are(tmp_path):
    tensors = {
        f"{PREFIX}.gate_up_proj": random(EXPERTS, HIDDEN, 2 * WIDTH),
        f"{PREFIX}.down_proj": random(EXPERTS, WIDTH, HIDDEN),
    }
    model = understand(open_checkpoint(checkpoint(tmp_path / "src", tensors)))
    assert not model.weights


def test_a_stack_of_scales_for_another_number_of_experts_is_refused(tmp_path, fused):
    tensors = {}
    for word in ("gate_up_proj", "down_proj"):
        tensors |= quantised(f"{PREFIX}.{word}", fused[f"{PREFIX}.{word}"], "_scale_inv")
    tensors[f"{PREFIX}.down_proj_scale_inv"] = torch.ones(EXPERTS + 1, 2, 1)
    table = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = checkpoint(tmp_path / "src", tensors, quantization_config=table)
    with pytest.raises(KconvertError, match=r"down_proj_scale_inv' is a stack of 4 matrices, but there are 3 experts"):
        plan(source, Recipe("bf16"))


def test_a_matrix_in_a_stack_and_apart_is_refused(tmp_path, fused):
    twice = {f"{PREFIX}.0.down_proj.weight": random(HIDDEN, WIDTH)}
    source = checkpoint(tmp_path / "src", {**fused, **twice})
    with pytest.raises(
        KconvertError, match=r"down_proj' has '.*0.down_proj.weight' in it, which is also a tensor of its"
    ):
        plan(source, Recipe("fp8"))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SCALE = f"{PREFIX}.gate_up_proj_scale_inv"


@pytest.mark.parametrize("width", [96, 200])
def test_blocks_that_reach_from_gate_into_up_are_refused(tmp_path, width):
    """Whoever quantised the whole stack has other scales there than who quantised gate and up."""
    tensors = {f"{PREFIX}.gate_up_proj": random(EXPERTS, 2 * width, HIDDEN, dtype=torch.float8_e4m3fn)}
    tensors |= {f"{PREFIX}.down_proj": random(EXPERTS, HIDDEN, width, dtype=torch.float8_e4m3fn)}
    tensors |= {SCALE: torch.ones(EXPERTS, -(-2 * width // 128), 2)}
    tensors |= {f"{PREFIX}.down_proj_scale_inv": torch.ones(EXPERTS, 2, -(-width // 128))}
    source = checkpoint(tmp_path / "src", tensors, quantization_config=FP8)
    with pytest.raises(KconvertError, match=f"gate_up_proj' have {width} rows, which are no whole blocks of 128, so"):
        plan(source, Recipe("bf16"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({SCALE: torch.tensor(1.0)}, r"_scale_inv' is a stack of 1 matrix, but there are 3 experts"),
        ({f"{PREFIX}.gate_up_proj.weight": torch.ones(3, 256, 256)}, r"gate_up_proj' are two names for the same matr"),
        (
            {f"{PREFIX}.gate_up_proj.weight_scale_inv": torch.ones(3)},
            r"_scale_inv' are two names for the same matrices",
        ),
        (
            {f"{PREFIX}.up_proj": torch.ones(3, 128, 256)},
            r"has '.*0.up_proj.weight' in it, which is also in another st",
        ),
    ],
    ids=["one scale", "codes twice", "scales twice", "up twice"],
)
def test_a_stack_that_is_not_whole_is_refused(tmp_path, fused, changes, said):
    tensors = {}
    for word in ("gate_up_proj", "down_proj"):
        tensors |= quantised(f"{PREFIX}.{word}", fused[f"{PREFIX}.{word}"], "_scale_inv")
    source = checkpoint(tmp_path / "src", {**tensors, **changes}, quantization_config=FP8)
    with pytest.raises(KconvertError, match=said):
        plan(source, Recipe("bf16"))


def test_matrices_of_one_number_stay_matrices(tmp_path):
    tensors = {f"{PREFIX}.gate_up_proj": random(1, 2, 1), f"{PREFIX}.down_proj": random(1, 1, 1)}
    source = checkpoint(tmp_path / "src", tensors)
    convert(plan(source, Recipe("fp8")), tmp_path / "dst")
    assert tensors_of(tmp_path / "dst")[f"{PREFIX}.0.down_proj.weight"].shape == (1, 1)


def test_a_stack_without_matrices_is_refused_where_the_manifest_knows_it(tmp_path, raw):
    convert(
        plan_synthetic(SampleRecipe("step-3", {"layers": 4, "experts": 2, "hidden": 128, "vocab": 128})), tmp_path / "s"
    )
    damaged = raw.load(tmp_path / "s")
    name = next(name for name in damaged if name.endswith("moe.down_proj.weight"))
    damaged[name].shape = [damaged[name].shape[0], damaged[name].shape[1] * damaged[name].shape[2]]
    damaged.put(f"{name}_scale_inv", raw.Tensor("F32", [2, 1, 1], bytes(8)))
    with pytest.raises(KconvertError, match=r"down_proj.weight' is BF16 \[2, .*\], which is no stack of matrices"):
        plan(damaged.save(), Recipe("bf16"))


@pytest.mark.parametrize("expert", [0, 2])
def test_a_bad_scale_of_a_matrix_is_in_the_tensor_of_the_file(tmp_path, fused, expert):
    tensors = {}
    for word in ("gate_up_proj", "down_proj"):
        tensors |= quantised(f"{PREFIX}.{word}", fused[f"{PREFIX}.{word}"], "_scale_inv")
    tensors[SCALE][expert, 1, 1] = torch.nan
    source = checkpoint(tmp_path / "src", tensors, quantization_config=FP8)
    said = rf"part '\S+experts.{expert}.up_proj.weight_scale_inv' of tensor '{SCALE}' is not finite at \[0, 1\]"
    with pytest.raises(KconvertError, match=rf"model.safetensors: {said}"):
        convert(plan(source, Recipe("bf16")), tmp_path / "dst")
