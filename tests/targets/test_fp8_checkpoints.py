"""Whole checkpoints to and from FP8: what is quantised, what is proved, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kconvert import CheckFailed, KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.formats.fp8 import Fp8
from kconvert.models.model import Model

LAYOUTS = ("experts", "all", "compressed-tensors", "compressed-tensors-channel")
LAYER = "model.layers.1.mlp.experts.0.gate_proj"
ATTENTION = "model.layers.1.self_attn."
Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="session")
def fp8(int4: Path) -> dict[str, Path]:
    """`int4` converted to FP8, in every layout; look, do not touch."""
    roots = {layout: int4.parent / f"fp8-{layout}" for layout in LAYOUTS}
    for layout, root in roots.items():
        convert(plan(int4, Recipe("fp8", layout=layout, shard_size=300_000)), root)
    return roots


def quantisation(root: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((root / "config.json").read_text())["quantization_config"]
    return table


def in_fp8(model: Model) -> set[str]:
    return {weight.name for weight in model.weights if isinstance(weight.format, Fp8)}


def test_what_each_layout_quantises(fp8: dict[str, Path]) -> None:
    models = {layout: inspect(root) for layout, root in fp8.items()}
    everything = {weight.name for weight in models["all"].weights} - {"lm_head"}
    fused = {name for name in everything if name.endswith(("q_a_proj", "kv_a_proj_with_mqa"))}
    assert in_fp8(models["experts"]) == {name for name in everything if ".experts." in name}
    assert in_fp8(models["all"]) == everything
    assert in_fp8(models["compressed-tensors"]) == everything - fused
    assert in_fp8(models["compressed-tensors-channel"]) == everything - fused


def test_tensors_have_the_names_dtypes_and_shapes_of_their_layout(fp8: dict[str, Path]) -> None:
    expected = {
        "experts": ("weight_scale_inv", "F32", (1, 2)),
        "all": ("weight_scale_inv", "F32", (1, 2)),
        "compressed-tensors": ("weight_scale", "BF16", (1, 2)),
        "compressed-tensors-channel": ("weight_scale", "BF16", (128, 1)),
    }
    for layout, (suffix, dtype, shape) in expected.items():
        tensors = inspect(fp8[layout]).checkpoint.tensors
        scale, weight = tensors[f"{LAYER}.{suffix}"], tensors[f"{LAYER}.weight"]
        assert (scale.dtype, scale.shape) == (dtype, shape)
        assert (weight.dtype, weight.shape) == ("F8_E4M3", (128, 256))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_to_fp8_equals_the_way_by_bf16(
    fp8: dict[str, Path], bf16: Path, tmp_path: Path, tree: Tree, layout: str
) -> None:
    convert(plan(bf16, Recipe("fp8", layout=layout, shard_size=300_000)), tmp_path / "out")
    assert tree(tmp_path / "out") == tree(fp8[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_proves_an_fp8_output_and_its_way_back(
    fp8: dict[str, Path], int4: Path, tmp_path: Path, layout: str
) -> None:
    report = verify(int4, fp8[layout])
    assert report.weights == len(inspect(int4).weights)
    assert "reference encoding" in report.reference
    convert(plan(fp8[layout], Recipe("bf16", "fp8")), tmp_path / "bf16")
    told = "the source's values, decompressed by the proof's own code and checked by compressed-tensors"
    assert verify(fp8[layout], tmp_path / "bf16").reference == told
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_by_mse_are_proved_and_their_gain_is_printed(
    int4: Path, tmp_path: Path, kconvert: Any, layout: str
) -> None:
    run = kconvert("int4-to-fp8", int4, tmp_path / "out", "--layout", layout, "--scales", "mse", "--json")
    assert run.returncode == 0, run.stderr
    ((_, gain),) = json.loads(run.stdout)["sqnr_db"].items()
    assert gain["mse"] > gain["amax"]
    assert verify(int4, tmp_path / "out").weights > 0


@pytest.mark.parametrize("suffix", ["weight", "weight_scale_inv"])
def test_verify_finds_one_changed_bit(fp8: dict[str, Path], int4: Path, tmp_path: Path, raw: Any, suffix: str) -> None:
    damaged = raw.load(fp8["experts"])
    tensor = damaged[f"{LAYER}.{suffix}"]
    tensor.data = tensor.data[:4] + bytes([tensor.data[4] ^ 1]) + tensor.data[5:]
    for path in int4.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    root = damaged.save(tmp_path / "damaged")
    for name in inspect(int4).checkpoint.side_files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((int4 / name).read_bytes())
    with pytest.raises(CheckFailed, match=f"{LAYER}.{suffix}.*element {4 if suffix == 'weight' else 1}"):
        verify(int4, root)


def test_short_edge_blocks_of_kv_a(sample: Callable[..., Path], tmp_path: Path) -> None:
    source = sample(tmp_path / "source", kv_rank=512, hidden=320, layers=2, experts=1)
    convert(plan(source, Recipe("fp8", layout="all")), tmp_path / "fp8")
    kv_a = inspect(tmp_path / "fp8").checkpoint.tensors[f"{ATTENTION}kv_a_proj_with_mqa.weight_scale_inv"]
    assert kv_a.shape == (5, 3)
    verify(source, tmp_path / "fp8")
    convert(plan(tmp_path / "fp8", Recipe("bf16")), tmp_path / "bf16")
    verify(tmp_path / "fp8", tmp_path / "bf16")


def test_threads_and_memory_do_not_change_a_byte(sample: Callable[..., Path], tmp_path: Path, tree: Tree) -> None:
    source = sample(tmp_path / "source", layers=2, experts=2, moe_intermediate=320)
    outputs = []
    for number, (threads, memory) in enumerate([(1, None), (5, 1), (2, 1 << 20)]):
        root = tmp_path / f"out{number}"
        convert(plan(source, Recipe("fp8", layout="all")), root, threads=threads, memory=memory)
        outputs.append(tree(root))
    assert outputs[0] == outputs[1] == outputs[2]


def test_experts_of_layout_all_are_copied_and_the_rest_decoded(fp8: dict[str, Path], tmp_path: Path) -> None:
    again = plan(fp8["all"], Recipe("fp8", layout="experts"))
    assert again.facts["lossy"] == {}
    assert set(again.facts["lossless"]) == {"fp8 block 128x128 -> bf16"}
    convert(again, tmp_path / "out")
    assert in_fp8(inspect(tmp_path / "out")) == in_fp8(inspect(fp8["experts"]))
    verify(fp8["all"], tmp_path / "out")


def test_codes_under_bf16_scales_stay_as_they_are(fp8: dict[str, Path], tmp_path: Path, raw: Any) -> None:
    """Qwen's releases have such scales, and engines read either."""
    checkpoint = raw.load(shutil.copytree(fp8["all"], tmp_path / "src"))
    for tensors in checkpoint.files.values():
        for name, tensor in tensors.items():
            if name.endswith("weight_scale_inv"):
                scale = torch.frombuffer(bytearray(tensor.data), dtype=torch.float32).bfloat16()
                tensor.dtype, tensor.data = "BF16", scale.view(torch.uint8).numpy().tobytes()
    source = checkpoint.save()
    convert(plan(source, Recipe("fp8", layout="experts")), tmp_path / "dst")
    assert inspect(tmp_path / "dst").weights
    written, before = raw.load(tmp_path / "dst"), raw.load(source)
    for suffix in (".weight", ".weight_scale_inv"):
        assert written[LAYER + suffix].data == before[LAYER + suffix].data


def test_a_layout_that_the_source_has_already_is_refused(fp8: dict[str, Path]) -> None:
    with pytest.raises(KconvertError, match="nothing to convert"):
        plan(fp8["all"], Recipe("fp8", layout="all"))


def test_the_plan_says_what_is_lossy(int4: Path, bf16: Path) -> None:
    facts = plan(int4, Recipe("fp8")).facts
    assert facts["lossy"] == {"int4 group 32 -> fp8 block 128x128": 24}
    assert facts["lossless"] == {}
    assert plan(int4, Recipe("bf16")).facts["lossless"] == {"int4 group 32 -> bf16": 24}
    assert set(plan(bf16, Recipe("fp8")).facts["lossy"]) == {"bf16 -> fp8 block 128x128"}


def test_parts_of_a_weight_may_lie_in_different_shards(
    fp8: dict[str, Path], tmp_path: Path, raw: Any, tree: Tree
) -> None:
    source = raw.load(fp8["all"])
    for name in [name for name in source if name.endswith("weight_scale_inv")]:
        source.move(name, "scales.safetensors")
    root = source.save(tmp_path / "scattered")
    for origin, output in ((fp8["all"], "whole"), (root, "parts")):
        convert(plan(origin, Recipe("bf16")), tmp_path / output)
    shards = {name: data for name, data in tree(tmp_path / "whole").items() if name.endswith(".safetensors")}
    assert shards.items() <= tree(tmp_path / "parts").items()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("value", "fault"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (-1.0, "negative")],
    ids=["nan", "inf", "negative"],
)
def test_bad_scales_are_named(
    fp8: dict[str, Path], tmp_path: Path, raw: Any, layout: str, value: float, fault: str
) -> None:
    source = raw.load(fp8[layout])
    name = next(n for n in source if n.startswith(LAYER) and "scale" in n)
    tensor = source[name]
    dtype = torch.float32 if tensor.dtype == "F32" else torch.bfloat16
    scale = torch.frombuffer(bytearray(tensor.data), dtype=dtype)
    scale[1] = value
    tensor.data = scale.view(torch.uint8).numpy().tobytes()
    root = source.save(tmp_path / "source")
    with pytest.raises(KconvertError, match=rf"{name}.*{fault} at \[(0, 1|1, 0)\]"):
        convert(plan(root, Recipe("bf16")), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def _drop_rows(source: Any) -> None:
    tensor = source[f"{LAYER}.weight_scale_inv"]
    tensor.shape, tensor.data = [1, 1], tensor.data[:4]


def _drop_scale(source: Any) -> None:
    source.pop(f"{LAYER}.weight_scale_inv")


def _widen_weight(source: Any) -> None:
    tensor = source[f"{LAYER}.weight"]
    tensor.shape, tensor.data = [128, 257], tensor.data + bytes(128)


def _second_scale(source: Any) -> None:
    source.put(f"{LAYER}.weight_scale", source[f"{LAYER}.weight_scale_inv"])


def _short_scale(source: Any) -> None:
    tensor = source[f"{LAYER}.weight_scale_inv"]
    tensor.dtype, tensor.data = "I16", tensor.data[:4]


@pytest.mark.parametrize(
    "damage",
    [_drop_rows, _drop_scale, _widen_weight, _second_scale, _short_scale],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_tensors_that_disagree_are_named(
    fp8: dict[str, Path], tmp_path: Path, raw: Any, damage: Callable[[Any], None]
) -> None:
    source = raw.load(fp8["experts"])
    damage(source)
    with pytest.raises(KconvertError, match=LAYER):
        plan(source.save(tmp_path / "source"), Recipe("bf16"))


@pytest.mark.parametrize("block", [[0, 128], [128], "wide", [128, None]], ids=str)
def test_a_malformed_block_size_is_an_error(fp8: dict[str, Path], tmp_path: Path, raw: Any, block: Any) -> None:
    source = raw.load(fp8["experts"])
    source.config["quantization_config"]["weight_block_size"] = block
    with pytest.raises(KconvertError, match=r"config\.json"):
        plan(source.save(tmp_path / "source"), Recipe("bf16"))


def test_values_that_are_not_finite_stop_the_conversion(bf16_copy: Path, tmp_path: Path, raw: Any) -> None:
    source = raw.load(bf16_copy)
    tensor = source[f"{LAYER}.weight"]
    tensor.data = tensor.data[:-2] + struct.pack("<H", 0x7F80)
    source.save()
    with pytest.raises(KconvertError, match=f"{LAYER}.*not finite"):
        convert(plan(bf16_copy, Recipe("fp8")), tmp_path / "out")


def small(raw: Any, root: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    """A checkpoint of no known model."""
    codes = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    entries = {
        name: raw.Tensor(codes[value.dtype], list(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in tensors.items()
    }
    checkpoint: Path = raw.new(root, {"model.safetensors": entries}, {"quantization_config": quantization}).save()
    return checkpoint


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **weights}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    group = {"targets": ["Linear"], "weights": args, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


DIALECTS = {
    "channel": (compressed("channel"), (96, 1)),
    "channel, flat": (compressed("channel"), (96,)),
    "tensor": (compressed("tensor"), (1,)),
    "tensor, scalar": (compressed("tensor"), ()),
    "block": (compressed("block", block_structure=[64, 32]), (2, 2)),
    "block, old spelling": (compressed("block", block_structure="64x32"), (2, 2)),
    "naive": ({**compressed("tensor"), "format": "naive-quantized"}, (1,)),
    "AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, ()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_static_fp8_of_every_shape_decodes(dialect: str, dtype: torch.dtype, tmp_path: Path, raw: Any) -> None:
    quantization, shape = DIALECTS[dialect]
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(96, 48, generator=generator) * 30).to(torch.float8_e4m3fn)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)
    tensors = {
        "a.weight": codes,
        "a.weight_scale": scale,
        "a.input_scale": torch.ones((), dtype=dtype),
        "a.bias": torch.ones(96),
        "norm.weight": torch.ones(48).bfloat16(),
    }
    source = small(raw, tmp_path / "source", tensors, quantization)
    convert(plan(source, Recipe("bf16", "fp8")), tmp_path / "out")
    written = raw.load(tmp_path / "out")
    assert sorted(written) == ["a.bias", "a.weight", "norm.weight"]
    spread = scale.float()
    if shape == (2, 2):
        spread = spread.repeat_interleave(64, 0)[:96].repeat_interleave(32, 1)[:, :48]
    elif shape == (96,):
        spread = spread.view(96, 1)
    expected = (codes.float() * spread).bfloat16()
    assert written["a.weight"].data == expected.view(torch.uint8).numpy().tobytes()
    verify(source, tmp_path / "out")


def test_the_commands(int4: Path, tmp_path: Path, kconvert: Any) -> None:
    done = kconvert("int4-to-fp8", int4, tmp_path / "fp8", "--layout", "compressed-tensors", "-q")
    assert done.returncode == 0, done.stderr
    assert quantisation(tmp_path / "fp8")["quant_method"] == "compressed-tensors"
    assert kconvert("fp8-to-bf16", tmp_path / "fp8", tmp_path / "bf16", "-q").returncode == 0
    shown = kconvert("convert", tmp_path / "bf16", tmp_path / "x", "--to", "fp8", "--dry-run").stdout
    assert "layout: experts" in shown
    assert "lossy: bf16 -> fp8 block 128x128, 24 weights" in shown
    wrong = kconvert("fp8-to-bf16", int4, tmp_path / "y")
    assert wrong.returncode == 2
    assert "int4 group 32, not fp8" in wrong.stderr
    wrong = kconvert("convert", int4, tmp_path / "y", "--to", "bf16", "--layout", "experts")
    assert wrong.returncode == 2
    assert "no layout 'experts'" in wrong.stderr


@pytest.mark.parametrize("to", ["int4", "int8", "mxfp4"])
def test_a_model_without_experts_is_not_written_as_bf16_that_claims_a_quantisation(
    fp8: dict[str, Path], raw: Any, tmp_path: Path, to: str
) -> None:
    checkpoint = raw.load(fp8["all"])
    checkpoint.config["num_hidden_layers"] = 1  # the first layer is dense
    for tensors in checkpoint.files.values():
        for name in [name for name in tensors if name.startswith(("model.layers.1.", "model.layers.2."))]:
            del tensors[name]
    with pytest.raises(
        KconvertError, match=rf"has no weight that {to}.* is for \(by their names, none is a routed exp"
    ):
        plan(checkpoint.save(tmp_path / "dense"), Recipe(to))


def test_a_part_that_holds_no_codes_declares_none(fp8: dict[str, Path], tmp_path: Path) -> None:
    chosen = (f"{ATTENTION}*",)
    convert(plan(fp8["all"], Recipe("int4", include=chosen)), tmp_path / "part")
    assert "quantization_config" not in json.loads((tmp_path / "part/config.json").read_text())
    verify(fp8["all"], tmp_path / "part", include=chosen)


@pytest.mark.parametrize(("width", "layout"), [(192, "experts"), (192, "compressed-tensors"), (128, "experts")])
def test_experts_whose_blocks_are_cut_off_are_a_finding_that_offers_scales_by_channel(
    sample: Callable[..., Path], tmp_path: Path, width: int, layout: str
) -> None:
    source = sample(tmp_path / "int4", moe_intermediate=width, q_rank=128, kv_rank=128)
    findings = plan(source, Recipe("fp8", layout=layout)).facts.get("findings", [])
    assert [("compressed-tensors-channel" in f, "refuse experts" in f) for f in findings] == [(True, True)] * (
        width == 192
    )
    assert "findings" not in plan(source, Recipe("fp8", layout="compressed-tensors-channel")).facts


def test_a_projection_whose_blocks_are_cut_off_is_a_finding_for_transformers_alone(int4: Path) -> None:
    """kv_a_proj_with_mqa has 576 rows in the published model, too."""
    (finding,) = plan(int4, Recipe("fp8", layout="all")).facts["findings"]
    assert "kv_a_proj_with_mqa" in finding
    assert "refuse experts" not in finding
