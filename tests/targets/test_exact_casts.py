"""Checkpoints whose scales are powers of two: what keeps every value in another encoding, what is counted, and what refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.formats.fp8 import Fp8
from kconvert.formats.mx import Mx
from kconvert.models.model import Model
from kconvert.report.summary import describe_plan
from kconvert.targets.planner import make_plan
from kconvert.targets.sample import SampleRecipe, plan_synthetic

EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="session")
def mxfp4(int4: Path) -> Path:
    """`int4` with its experts in MXFP4; look, do not touch."""
    root = int4.parent / "mxfp4"
    convert(plan(int4, Recipe("mxfp4")), root)
    return root


@pytest.fixture(scope="session")
def values(mxfp4: Path) -> Path:
    """`mxfp4` in BF16."""
    root = mxfp4.parent / "mxfp4-values"
    convert(plan(mxfp4, Recipe("bf16")), root)
    return root


@pytest.fixture
def wide(mxfp4: Path, tmp_path: Path, raw: Any) -> Path:
    """`mxfp4` with a group of one expert 16 binades below the others of its tile, which has them all in one binade."""
    checkpoint = raw.load(mxfp4)
    scale = checkpoint[f"{EXPERT}.weight_scale"]
    scale.data = bytes([120] * 7 + [104]) + bytes([120] * (len(scale.data) - 8))
    codes = checkpoint[f"{EXPERT}.weight_packed"]
    codes.data = bytes([0x17] * len(codes.data))  # 6 and 0.5
    root: Path = checkpoint.save(tmp_path / "wide")
    return root


def quantisation(root: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((root / "config.json").read_text())["quantization_config"]
    return table


@pytest.mark.parametrize(
    ("to", "layout", "fate"),
    [
        ("fp8", "experts", "recovered"),
        ("fp8", "compressed-tensors", "recovered"),
        ("fp8", "compressed-tensors-channel", "recovered"),
        ("mxfp8", "experts", "lossless"),
        ("mxfp8", "ktransformers", "lossless"),
    ],
)
def test_mxfp4_keeps_every_value_in_eight_bits(
    mxfp4: Path, values: Path, tmp_path: Path, raw: Any, to: str, layout: str, fate: str
) -> None:
    made = plan(mxfp4, Recipe(to, layout=layout, require_exact=not layout.startswith("compressed")))
    assert made.facts[fate] == {f"mxfp4 -> {'mxfp8' if to == 'mxfp8' else made_label(layout)}": 24}
    assert convert(made, tmp_path / "out") == {}
    report = verify(mxfp4, tmp_path / "out")
    assert report.weights == len(inspect(mxfp4).weights)
    convert(plan(tmp_path / "out", Recipe("bf16")), tmp_path / "back")
    theirs, ours = raw.load(values), raw.load(tmp_path / "back")
    for name in (w.name for w in inspect(mxfp4).weights if w.role.startswith("expert")):
        assert ours[f"{renamed(name, to, layout)}.weight"] == theirs[f"{name}.weight"]


def made_label(layout: str) -> str:
    return "fp8 channel" if layout.endswith("channel") else "fp8 block 128x128"


def renamed(name: str, to: str, layout: str) -> str:
    if layout != "ktransformers":
        return name
    layer, expert, matrix = name.split(".")[2], name.split(".")[5], name.rpartition(".")[2]
    short = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[matrix]
    if to == "mxfp4":
        return f"layers.{layer}.ffn.experts.{expert}.{short}"
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{short}"


def test_a_tile_with_too_wide_a_spread_is_counted_and_told(wide: Path, tmp_path: Path, kconvert: Any) -> None:
    assert convert(plan(wide, Recipe("fp8")), tmp_path / "out") == {EXPERT: 1}
    verify(wide, tmp_path / "out")
    told = kconvert("convert", wide, tmp_path / "again", "--to", "fp8").stdout
    assert (
        f"no codes and scale reproduce the values of 1 block in 1 weight, which the rule quantised; first in '{EXPERT}'"
        in told
    )


def test_require_exact_refuses_it_by_name(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(
        KconvertError, match=rf"'{EXPERT}' cannot be written as fp8 .*: 1 of its blocks have values that no"
    ):
        convert(plan(wide, Recipe("fp8", require_exact=True)), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_bf16_that_was_mxfp4_comes_back(mxfp4: Path, values: Path, tmp_path: Path, raw: Any) -> None:
    for to, label in (("mxfp4", "mxfp4"), ("mxfp8", "mxfp8")):
        made = plan(values, Recipe(to, require_exact=True))
        assert made.facts["recovered"] == {f"bf16 -> {label}": 24}
        assert convert(made, tmp_path / to) == {}
        verify(values, tmp_path / to)
    assert raw.load(tmp_path / "mxfp4")[f"{EXPERT}.weight_packed"] == raw.load(mxfp4)[f"{EXPERT}.weight_packed"]


def test_bf16_that_was_mxfp4_keeps_its_values_in_fp8_if_asked_for_powers_of_two(values: Path, tmp_path: Path) -> None:
    assert plan(values, Recipe("fp8")).facts["lossy"] == {"bf16 -> fp8 block 128x128": 24}
    assert convert(plan(values, Recipe("fp8", scales="ue8m0", require_exact=True)), tmp_path / "out") == {}
    verify(values, tmp_path / "out")


@pytest.mark.parametrize("layout", ["experts", "all", "compressed-tensors"])
def test_fp8_with_scales_by_amax_gets_powers_of_two_if_asked(bf16: Path, tmp_path: Path, raw: Any, layout: str) -> None:
    convert(plan(bf16, Recipe("fp8", layout=layout)), tmp_path / "fp8")
    assert "scale_fmt" not in quantisation(tmp_path / "fp8")
    asked = Recipe("fp8", layout=layout, scales="ue8m0")
    convert(plan(tmp_path / "fp8", asked), tmp_path / "out")
    assert quantisation(tmp_path / "out")["scale_fmt"] == "ue8m0"
    verify(tmp_path / "fp8", tmp_path / "out")
    written = raw.load(tmp_path / "out")
    scales = [written[name] for name in written if "weight_scale" in name]
    size, fraction = (4, 0x7FFFFF) if scales[0].dtype == "F32" else (2, 0x7F)
    words = (int.from_bytes(t.data[i : i + size], "little") for t in scales for i in range(0, len(t.data), size))
    assert not any(word & fraction for word in words)
    with pytest.raises(KconvertError, match="nothing to convert"):
        plan(tmp_path / "out", asked)
    with pytest.raises(KconvertError, match="nothing to convert"):
        plan(tmp_path / "out", Recipe("fp8", layout=layout))


@pytest.mark.parametrize("source", ["int4", "bf16"])
def test_verify_finds_one_changed_bit_beside_scales_that_are_powers_of_two(
    request: pytest.FixtureRequest, tmp_path: Path, raw: Any, source: str
) -> None:
    from kconvert import CheckFailed

    origin = request.getfixturevalue(source)
    convert(plan(origin, Recipe("fp8", scales="ue8m0")), tmp_path / "out")
    verify(origin, tmp_path / "out")
    damaged = raw.load(tmp_path / "out")
    tensor = damaged[f"{EXPERT}.weight"]
    tensor.data = tensor.data[:4] + bytes([tensor.data[4] ^ 1]) + tensor.data[5:]
    damaged.save()
    with pytest.raises(CheckFailed, match=f"{EXPERT}.weight"):
        verify(origin, tmp_path / "out")


def test_powers_of_two_are_for_blocks_of_fp8(int4: Path) -> None:
    for to, layout in (("mxfp4", ""), ("int4", ""), ("bf16", ""), ("fp8", "compressed-tensors-channel")):
        with pytest.raises(KconvertError, match=f"for FP8 in blocks.*not for {to}"):
            Recipe(to, layout=layout, scales="ue8m0")


@pytest.mark.parametrize("to", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("source", ["int4", "mxfp4"])
def test_kt_kernel_finds_every_expert(
    request: pytest.FixtureRequest, tmp_path: Path, raw: Any, source: str, to: str
) -> None:
    origin = request.getfixturevalue(source)
    convert(plan(origin, Recipe(to, layout="ktransformers")), tmp_path / "out")
    written, had = raw.load(tmp_path / "out"), raw.load(origin)
    experts = [w.name for w in inspect(origin).weights if w.role.startswith("expert")]
    scale, dtypes = ("scale", ("I8", "F8_E8M0")) if to == "mxfp4" else ("weight_scale_inv", ("F8_E4M3", "U8"))
    for name in experts:
        other = renamed(name, to, "ktransformers")
        assert (written[f"{other}.weight"].dtype, written[f"{other}.{scale}"].dtype) == dtypes
        if source == to:
            assert written[f"{other}.weight"].data == had[f"{name}.weight_packed"].data
            assert written[f"{other}.{scale}"].data == had[f"{name}.weight_scale"].data
    assert not any(".mlp.experts." in name for name in written)
    report = verify(origin, tmp_path / "out")
    assert report.weights == len(inspect(origin).weights)


def test_codes_that_are_only_called_otherwise_are_copied(mxfp4: Path, tmp_path: Path) -> None:
    made = plan(mxfp4, Recipe("mxfp4", layout="ktransformers"))
    assert made.facts["transcoded"] == 0
    assert "lossy" not in "\n".join(describe_plan(made, _delivery(tmp_path), None, None, None, None).lines)


def _delivery(root: Path) -> Any:
    from kconvert.run.delivery import Delivery

    return Delivery(root)


def in_deepseek_v4s_words(root: Path, **spelling: Any) -> Model:
    """The checkpoint as if its model called the parts of weights as DeepSeek-V4 does."""
    model = inspect(root)
    spelt = {"fp8": {"scale_name": "scale", "scale_dtype": "F8_E8M0"}, **spelling}
    return replace(model, manifest=replace(model.manifest, name="like-v4", spelling=spelt))


@pytest.mark.parametrize(("layout", "dtype", "experts"), [("vllm", "F32", "fp8"), ("sglang", "F8_E8M0", None)])
def test_deepseek_v4_in_fp8_is_as_its_engine_wants_it(
    mxfp4: Path, tmp_path: Path, raw: Any, layout: str, dtype: str, experts: str | None
) -> None:
    made = make_plan(in_deepseek_v4s_words(mxfp4), Recipe("fp8", layout=layout))
    convert(made, tmp_path / "out")
    written = raw.load(tmp_path / "out")
    assert written.config.get("expert_dtype") == experts
    assert written.config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    assert written[f"{EXPERT}.scale"].dtype == dtype
    assert not any("weight_scale" in name for name in written)
    assert {type(w.format) for w in inspect(tmp_path / "out").weights if w.role.startswith("expert")} == {Fp8}
    verify(mxfp4, tmp_path / "out")


def test_the_layouts_of_deepseek_v4_and_of_the_others_are_not_each_others(mxfp4: Path) -> None:
    with pytest.raises(
        KconvertError, match=r"fp8 has no layout 'vllm' for kimi-k2-thinking.*it has experts, all, comp"
    ):
        plan(mxfp4, Recipe("fp8", layout="vllm"))
    with pytest.raises(KconvertError, match=r"fp8 has no layout 'experts' for like-v4.*it has vllm, sglang"):
        make_plan(in_deepseek_v4s_words(mxfp4), Recipe("fp8", layout="experts"))
    assert make_plan(in_deepseek_v4s_words(mxfp4), Recipe("fp8")).facts["layout"] == "vllm"


def test_deepseek_v4_in_bf16_no_longer_says_what_its_experts_are_in(mxfp4: Path, tmp_path: Path, raw: Any) -> None:
    source = raw.load(mxfp4)
    source.config["expert_dtype"] = "fp4"
    convert(plan(source.save(tmp_path / "source"), Recipe("bf16")), tmp_path / "out")
    assert "expert_dtype" not in raw.load(tmp_path / "out").config


def test_renaming_needs_the_three_matrices_of_each_expert(mxfp4: Path) -> None:
    model = in_deepseek_v4s_words(mxfp4)
    plainly = replace(model, manifest=replace(model.manifest, spelling={}))
    odd = tuple(w._replace(role="expert.gate_up") if w.name == EXPERT else w for w in plainly.weights)
    with pytest.raises(
        KconvertError, match=rf"'{EXPERT}' is expert.gate_up, but kt-kernel reads the gate, up and down"
    ):
        make_plan(replace(plainly, weights=odd), Recipe("mxfp8", layout="ktransformers"))


def test_mx_and_fp8_of_other_names_hold_the_same_bytes() -> None:
    assert Mx(4, "F8_E8M0", codes_name="weight", codes_dtype="I8", scale_name="scale").usual == Mx(4).usual
    assert Fp8(scale_name="scale").usual == Fp8().usual
    assert Fp8(scale_dtype="U8").usual == Fp8(scale_dtype="F8_E8M0").usual != Fp8().usual


def test_the_plan_says_that_scales_will_be_powers_of_two(mxfp4: Path, bf16: Path) -> None:
    (note,) = plan(mxfp4, Recipe("fp8")).facts["notes"]
    assert note == "mxfp4 becomes FP8 by scales that are powers of two, which keep its values"
    assert "notes" not in plan(bf16, Recipe("fp8")).facts


def test_what_is_exact_is_told_beside_what_is_not(mxfp4: Path, tmp_path: Path, kconvert: Any) -> None:
    told = kconvert("convert", mxfp4, tmp_path / "out", "--to", "fp8", "--layout", "all").stdout
    assert "lossy: bf16 -> fp8 block 128x128" in told
    assert "every value of mxfp4 -> fp8 block 128x128 was reproduced exactly" in told


def test_deepseek_v41_says_what_its_experts_are_in_within_the_table(mxfp4: Path, tmp_path: Path, raw: Any) -> None:
    model = in_deepseek_v4s_words(mxfp4)
    model.checkpoint.config["quantization_config"]["expert_dtype"] = "fp4"
    convert(make_plan(model, Recipe("fp8", layout="vllm")), tmp_path / "out")
    config = raw.load(tmp_path / "out").config
    assert config["quantization_config"]["expert_dtype"] == "fp8"
    assert "expert_dtype" not in config


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{}.mlp.experts.{}.gate_proj",
        "layers.{}.ffn.experts.{}.w1",
        "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1",
        "transformer.h.{}.mlp.deepspeed_moe.experts.deepspeed_experts.{}.fc1",
        "backbone.layers.{}.mixer.experts.{}.mlp.up_proj",
        "model.layers.{}.mlp.expert_{}.up_proj",
    ],
)
def test_experts_of_a_model_without_a_manifest_are_found_by_name(tmp_path: Path, raw: Any, name: str) -> None:
    source = unknown(tmp_path / "source", raw, name)
    made = plan(source, Recipe("fp8"))
    assert made.facts["lossy"] == {"bf16 -> fp8 block 128x128": 4}
    convert(made, tmp_path / "out")
    verify(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "stack.layers.{}.parts.{}.a",
            r'\{ role = "expert.up", name = "stack.layers.\{layer\}.parts.\{expert\}.a", shape = ',
        ),
        ("net.{}a.lin{}", "no manifest knows newmoe, and no matrix has the number of an expert in its name"),
    ],
)
def test_where_names_show_no_experts_the_missing_lines_are_said(tmp_path: Path, raw: Any, name: str, told: str) -> None:
    with pytest.raises(KconvertError, match=f"none is a routed expert's.*{told}"):
        plan(unknown(tmp_path / "source", raw, name), Recipe("fp8"))


def unknown(root: Path, raw: Any, name: str) -> Path:
    """A BF16 checkpoint of no known model with two layers of two matrices of this name."""
    tensor = raw.Tensor("BF16", [32, 64], bytes(range(16)) * 256)
    names = [f"{name.format(layer, expert)}.weight" for layer in range(2) for expert in range(2)]
    entries = dict.fromkeys([*names, "model.layers.0.self_attn.q_proj.weight"], tensor)
    checkpoint: Path = raw.new(root, {"model.safetensors": entries}, {"model_type": "newmoe"}).save()
    return checkpoint


@pytest.fixture(scope="session", params=["deepseek-v4", "deepseek-v4-base", "deepseek-v4.1"])
def v4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V4 as it is published: experts in MXFP4, or (-Base) in FP8."""
    root: Path = tmp_path_factory.mktemp("v4") / request.param
    sizes = {"layers": 5, "experts": 2, "hidden": 256, "moe_intermediate": 128, "vocab": 128, "heads": 4, "q_rank": 128}
    convert(plan_synthetic(SampleRecipe(request.param, sizes)), root)
    return root


def test_what_deepseek_v4_does_not_declare_as_its_own_becomes_bf16(v4: Path, tmp_path: Path) -> None:
    convert(plan(v4, Recipe("int8", layout="all")), tmp_path / "int8")
    convert(plan(tmp_path / "int8", Recipe("mxfp4", layout="ktransformers")), tmp_path / "out")
    labels = {
        weight.format.label for weight in inspect(tmp_path / "out").weights if not weight.role.startswith("expert")
    }
    assert labels <= {"bf16", "fp8 block 1x32"}  # the tables of Engram stay
    verify(tmp_path / "int8", tmp_path / "out")


@pytest.mark.parametrize("layout", ["vllm", "sglang"])
def test_deepseek_v4_as_published_goes_to_fp8_for_both_engines(v4: Path, tmp_path: Path, raw: Any, layout: str) -> None:
    if (v4.name, layout) == ("deepseek-v4-base", "vllm"):
        with pytest.raises(KconvertError, match="nothing to convert"):
            plan(v4, Recipe("fp8"))
        return
    convert(plan(v4, Recipe("fp8", layout=layout)), tmp_path / "out")
    written = raw.load(tmp_path / "out")
    scales = {written[name].dtype for name in written if name.endswith(".scale") and "engram" not in name}
    assert scales == {"F32" if layout == "vllm" else "F8_E8M0"}
    table = written.config["quantization_config"]
    said = {**written.config, **table}.get("expert_dtype")
    assert said == ("fp8" if layout == "vllm" else None)
    assert table["weight_block_size"] == ([32, 32] if v4.name == "deepseek-v4.1" else [128, 128])
    verify(v4, tmp_path / "out")


@pytest.mark.parametrize("v4", ["deepseek-v4.1"], indirect=True)
@pytest.mark.parametrize("to", ["bf16", "f16", "fp8", "int4", "int8", "mxfp8", "nvfp4"])
def test_engram_tables_stay_as_engines_hold_them_in_every_output(v4: Path, tmp_path: Path, raw: Any, to: str) -> None:
    convert(plan(v4, Recipe(to)), tmp_path / "out")
    verify(v4, tmp_path / "out")
    had, has = raw.load(v4), raw.load(tmp_path / "out")
    names = [name for name in had if ".engram.embed." in name]
    assert {had[name].dtype for name in names} == {"F8_E4M3", "F8_E8M0"}
    assert [(had[name].dtype, had[name].data) for name in names] == [
        (has[name].dtype, has[name].data) for name in names
    ]


@pytest.mark.parametrize("v4", ["deepseek-v4.1"], indirect=True)
def test_values_beside_engram_tables_count_as_bf16(v4: Path, tmp_path: Path, raw: Any) -> None:
    convert(plan(v4, Recipe("bf16")), tmp_path / "bf16")
    with pytest.raises(KconvertError, match="holds no quantised weights; there is nothing to convert"):
        plan(tmp_path / "bf16", Recipe("bf16"))
    convert(plan(tmp_path / "bf16", Recipe("int4", source="bf16")), tmp_path / "int4")
    verify(tmp_path / "bf16", tmp_path / "int4")
    assert "layers.1.engram.embed.scale" in set(raw.load(tmp_path / "int4"))
