"""`--to mlx` makes a directory as mlx-lm has it, of the source's own codes; what MLX makes of it is what the plan says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlx_packing import affine, value

from kconvert import CheckFailed, KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.address import open_checkpoint
from kconvert.targets.sample import SampleRecipe, plan_cut, plan_synthetic

SIZES = {"layers": 3, "experts": 4, "hidden": 256, "moe_intermediate": 128, "vocab": 512, "heads": 4}
Weights = dict[str, torch.Tensor]


def sample(root: Path, like: str, **sizes: int) -> Path:
    convert(plan_synthetic(SampleRecipe(like, {**SIZES, **sizes})), root)
    return root


def weights(root: Path) -> Weights:
    from safetensors.torch import load_file

    return {name: tensor for path in root.glob("*.safetensors") for name, tensor in load_file(path).items()}


def damaged(checkpoint: Any, whole: Path, root: Path) -> Path:
    """The damaged checkpoint in a copy of all else that `whole` has."""
    shutil.copytree(whole, root, ignore=shutil.ignore_patterns("*.safetensors", ".kconvert"))
    saved: Path = checkpoint.save(root)
    return saved


@pytest.fixture(scope="module")
def mlx(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mlx") / "out"
    convert(plan(int4, Recipe("mlx")), root)
    return root


def test_experts_are_stacks_of_the_source_s_words_and_scales(int4: Path, mlx: Path) -> None:
    ours, theirs = weights(int4), weights(mlx)
    for word in ("gate_proj", "up_proj", "down_proj"):
        stack = "model.layers.1.mlp.switch_mlp." + word
        for expert in range(4):
            source = f"model.layers.1.mlp.experts.{expert}.{word}"
            assert theirs[f"{stack}.weight"].dtype == torch.uint32
            assert theirs[f"{stack}.weight"].view(torch.int32)[expert].equal(ours[f"{source}.weight_packed"])
            scale = ours[f"{source}.weight_scale"]
            assert theirs[f"{stack}.scales"][expert].equal(scale)
            assert theirs[f"{stack}.biases"][expert].equal(-8 * scale)


def test_config_json_declares_them_twice_and_nothing_else(mlx: Path) -> None:
    config = json.loads((mlx / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"} == config["quantization_config"]
    header = (mlx / "model-00001-of-00001.safetensors").read_bytes()[8:200]
    assert b'"format":"mlx"' in header


def test_kv_b_lies_by_heads_and_everything_else_is_copied(int4: Path, mlx: Path) -> None:
    ours, theirs = weights(int4), weights(mlx)
    config = json.loads((int4 / "config.json").read_text())
    nope, heads = config["qk_nope_head_dim"], config["num_attention_heads"]
    kv_b = ours["model.layers.0.self_attn.kv_b_proj.weight"].view(heads, -1, config["kv_lora_rank"])
    assert theirs["model.layers.0.self_attn.embed_q.weight"].equal(kv_b[:, :nope].mT)
    assert theirs["model.layers.0.self_attn.unembed_out.weight"].equal(kv_b[:, nope:])
    same = [name for name in ours if ".experts." not in name and "kv_b" not in name]
    assert all(theirs[name].equal(ours[name]) for name in same)


def test_it_verifies_and_converts_back_to_the_same_bf16(int4: Path, bf16: Path, mlx: Path, tmp_path: Path) -> None:
    assert all(comparison.equal for comparison in verify(int4, mlx).comparisons)
    assert verify(mlx, mlx).faults == ()
    convert(plan(mlx, Recipe("bf16")), tmp_path / "back")
    back, direct = weights(tmp_path / "back"), weights(bf16)
    assert back.keys() == direct.keys()
    assert all(back[name].equal(direct[name]) for name in back)


def test_a_directory_for_mlx_is_not_made_again(mlx: Path) -> None:
    with pytest.raises(KconvertError, match=r"has every weight as mlx would write it; there is nothing to convert"):
        plan(mlx, Recipe("mlx"))


def test_in_gguf_the_codes_of_a_directory_for_mlx_are_spelt_out_and_the_plan_says_so(mlx: Path) -> None:
    notes = plan(mlx, Recipe("gguf")).facts["notes"]
    (said,) = [note for note in notes if "become" in note]
    assert " weights in mlx int4 group 32 become bf16, 'model.layers.1.mlp.experts.0.down_proj' the first: " in said


def test_kv_b_that_mlx_lm_quantised_is_read_and_copied(int4: Path, mlx: Path, tmp_path: Path, raw: Any) -> None:
    """As `mlx_lm.convert --quantize` leaves it: both halves in groups of their own columns; that of layer 1 is still whole."""
    checkpoint, parts = raw.load(mlx), {}
    whole = "model.layers.1.self_attn.kv_b_proj.weight"
    for half in ("embed_q", "unembed_out"):
        checkpoint.pop(whole.replace("kv_b_proj", half))
    checkpoint.put(whole, raw.load(int4)[whole])
    name = "model.layers.0.self_attn."
    for half in ("embed_q", "unembed_out"):
        heads, rows, cols = checkpoint.pop(f"{name}{half}.weight").shape
        parts[half] = affine(heads * rows, cols, 8, 32, torch.bfloat16)
        for suffix, dtype in (("weight", "U32"), ("scales", "BF16"), ("biases", "BF16")):
            tensor = parts[half][suffix]
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            shape = [heads, rows, tensor.shape[1]]
            checkpoint.put(f"{name}{half}.{suffix}", raw.Tensor(dtype, shape, data))
    source = damaged(checkpoint, mlx, tmp_path / "source")
    convert(plan(source, Recipe("bf16")), tmp_path / "bf16")
    found = weights(tmp_path / "bf16")[f"{name}kv_b_proj.weight"]
    keys, values = (value(parts[half], 32).view(4, -1, parts[half]["codes"].shape[1]) for half in parts)
    assert found.equal(torch.cat([keys.mT, values], 1).flatten(0, 1))
    assert verify(source, tmp_path / "bf16").faults == ()
    convert(plan(source, Recipe("mlx")), tmp_path / "again")
    assert verify(source, tmp_path / "again").faults == ()


def test_a_flipped_bit_in_a_stack_is_found(int4: Path, mlx: Path, tmp_path: Path, raw: Any) -> None:
    checkpoint = raw.load(mlx)
    tensor = checkpoint["model.layers.1.mlp.switch_mlp.up_proj.biases"]
    tensor.data = tensor.data[:-1] + bytes([tensor.data[-1] ^ 1])
    with pytest.raises(CheckFailed, match=r"experts\.3\.up_proj"):
        verify(int4, damaged(checkpoint, mlx, tmp_path / "bad"))


def test_a_lost_part_of_kv_b_is_found(int4: Path, mlx: Path, tmp_path: Path, raw: Any) -> None:
    checkpoint = raw.load(mlx)
    checkpoint.pop("model.layers.0.self_attn.embed_q.weight")
    with pytest.raises(CheckFailed, match=r"kv_b_proj.*no embed_q\.weight"):
        verify(int4, damaged(checkpoint, mlx, tmp_path / "bad"))


@pytest.mark.parametrize("scales", ["amax", "f32"])
def test_mlx_rounds_twice_with_bf16_scales_and_not_at_all_with_f32(int4: Path, tmp_path: Path, scales: str) -> None:
    mx = pytest.importorskip("mlx.core")
    convert(plan(int4, Recipe("mlx", scales=scales)), tmp_path / "out")
    assert all(comparison.equal for comparison in verify(int4, tmp_path / "out").comparisons)
    ours, found = weights(int4), mx.load(str(tmp_path / "out" / "model-00001-of-00001.safetensors"))
    off = total = 0
    for expert in range(4):
        stack, source = "model.layers.1.mlp.switch_mlp.up_proj", f"model.layers.1.mlp.experts.{expert}.up_proj"
        parts = [found[f"{stack}.{suffix}"][expert] for suffix in ("weight", "scales", "biases")]
        theirs = mx.dequantize(*parts, group_size=32, bits=4)
        steps = ours[f"{source}.weight_scale"].float().repeat_interleave(32, 1)
        words = ours[f"{source}.weight_packed"].numpy().view("u4")
        codes = torch.from_numpy((words[..., None] >> np.arange(0, 32, 4, dtype="u4") & 15).astype("f4")).flatten(1)
        if scales == "f32":
            assert theirs.dtype == mx.float32
            assert torch.from_numpy(np.array(theirs)).equal((codes - 8) * steps)
        else:
            seen = torch.from_numpy(np.array(theirs.astype(mx.float32)))
            twice = ((codes * steps).bfloat16().float() + (-8 * steps)).bfloat16().float()
            assert seen.equal(twice)
            off += int((seen != ((codes - 8) * steps).bfloat16().float()).sum())
            total += seen.numel()
    assert scales == "f32" or 0.3 < off / total < 0.6


def test_the_plan_says_what_either_costs(int4: Path) -> None:
    narrow, wide = (plan(int4, Recipe("mlx", scales=scales)) for scales in ("amax", "f32"))
    assert any("rounds twice" in note for note in narrow.facts["notes"])
    assert any("every product exactly" in note for note in wide.facts["notes"])
    assert any("kv_b of 3 layers" in note for note in narrow.facts["notes"])
    assert wide.output_bytes > narrow.output_bytes


@pytest.mark.parametrize(("like", "mode", "bits"), [("kimi-k3", "mxfp4", 4), ("minimax-m3", "mxfp8", 8)])
def test_microscaled_floats_keep_their_bytes(tmp_path: Path, like: str, mode: str, bits: int) -> None:
    source = sample(tmp_path / "source", like, layers=4)
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    report = verify(source, tmp_path / "out")
    assert all(comparison.equal for comparison in report.comparisons)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": mode}
    assert "quantization_config" not in config["text_config"]
    ours, theirs = weights(source), weights(tmp_path / "out")
    codes = next(name for name in ours if name.endswith(("experts.1.w1.weight_packed", "experts.1.w1.weight")))
    stack = codes.partition(".experts.")[0] + ".switch_mlp.gate_proj.weight"
    assert theirs[stack][1].contiguous().view(torch.uint8).equal(ours[codes].view(torch.uint8))


@pytest.mark.parametrize(("like", "mode", "bits"), [("kimi-k3", "mxfp4", 4), ("minimax-m3", "mxfp8", 8)])
def test_mlx_reads_microscaled_floats_as_the_source_does(tmp_path: Path, like: str, mode: str, bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    source = sample(tmp_path / "source", like, layers=4)
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    convert(plan(source, Recipe("bf16")), tmp_path / "bf16")
    found = mx.load(str(tmp_path / "out" / "model-00001-of-00001.safetensors"))
    stack = next(name for name in found if name.endswith("switch_mlp.down_proj.weight")).removesuffix("weight")
    theirs = mx.dequantize(found[f"{stack}weight"], found[f"{stack}scales"], group_size=32, bits=bits, mode=mode)
    values = weights(tmp_path / "bf16")
    for expert in range(4):
        name = stack.replace("switch_mlp.down_proj.", f"experts.{expert}.w2.weight")
        seen = torch.from_numpy(np.array(theirs[expert].astype(mx.float32)))
        assert seen.view(torch.int32).equal(values[name].float().view(torch.int32))


def test_gpt_oss_s_rows_go_apart_and_verify_joins_them(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "gpt-oss")
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    assert all(comparison.equal for comparison in verify(source, tmp_path / "out").comparisons)
    ours, theirs = weights(source), weights(tmp_path / "out")
    experts = "model.layers.0.mlp.experts."
    blocks = ours[experts + "gate_up_proj_blocks"].flatten(2)
    assert theirs[experts + "up_proj.weight"].view(torch.uint8).equal(blocks[:, 1::2])
    assert theirs[experts + "gate_proj.scales"].equal(ours[experts + "gate_up_proj_scales"][:, ::2])
    assert theirs[experts + "gate_proj.bias"].equal(ours[experts + "gate_up_proj_bias"][:, ::2])
    assert theirs[experts + "down_proj.bias"].equal(ours[experts + "down_proj_bias"])
    with pytest.raises(KconvertError, match="as MLX has gpt-oss's experts"):
        plan(tmp_path / "out", Recipe("bf16"))


def test_block_fp8_becomes_bf16_and_mtp_stays_behind(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "deepseek-v3", dense_layers=1)
    made = plan(source, Recipe("mlx"))
    convert(made, tmp_path / "out")
    assert any("MTP" in note for note in made.facts["notes"])
    assert any(".eh_proj." in name for name in made.facts["dropped"])
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    report = verify(source, tmp_path / "out")
    assert all(comparison.equal for comparison in report.comparisons)
    assert any("MTP" in note for note in report.notes)


def test_a_model_of_dense_layers_alone_verifies_without_its_mtp_layers(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "deepseek-v3", dense_layers=3)
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    assert not any(".switch_mlp." in name for name in weights(tmp_path / "out"))
    report = verify(source, tmp_path / "out")
    assert report.faults == ()
    assert all(comparison.equal for comparison in report.comparisons)
    assert any("MTP" in note for note in report.notes)


@pytest.mark.parametrize(("key", "wrong"), [("bits", 8), ("group_size", 64), ("mode", "mxfp4")])
def test_a_declaration_that_the_tensors_contradict_is_found(
    int4: Path, mlx: Path, tmp_path: Path, key: str, wrong: object
) -> None:
    root = shutil.copytree(mlx, tmp_path / "out")
    config = json.loads((root / "config.json").read_text())
    config["quantization"][key] = config["quantization_config"][key] = wrong
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match=rf"switch_mlp.*{wrong}.*as config.json declares it"):
        verify(int4, root)


def test_experts_are_chosen_all_or_none(int4: Path) -> None:
    with pytest.raises(KconvertError, match="lies with those of all other experts"):
        plan(int4, Recipe("mlx", exclude=("*.experts.2.*",)))
    with pytest.raises(KconvertError, match="lies with those of all other experts"):
        plan(int4, Recipe("mlx", include=("*.experts.0.*",)))


def test_layers_without_experts_are_mlx_s_too(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "deepseek-v3", dense_layers=3)
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    report = verify(source, tmp_path / "out")
    assert all(comparison.equal for comparison in report.comparisons)
    assert any("MTP" in note for note in report.notes)


def test_signs_of_zeros_are_counted_and_refused_if_everything_is_to_be_exact(
    int4: Path, tmp_path: Path, raw: Any
) -> None:
    checkpoint = raw.load(int4)
    name = "model.layers.1.mlp.experts.0.up_proj."
    scale, codes = checkpoint[name + "weight_scale"], checkpoint[name + "weight_packed"]
    scale.data = bytes([scale.data[0], scale.data[1] | 0x80]) + scale.data[2:]
    codes.data = b"\x88" * 16 + codes.data[16:]
    source = checkpoint.save(tmp_path / "source")
    with pytest.raises(KconvertError, match=r"experts.0.up_proj.*1 of its groups has zeros that lose their signs"):
        convert(plan(source, Recipe("mlx", require_exact=True)), tmp_path / "out")
    assert convert(plan(source, Recipe("mlx")), tmp_path / "counted", overwrite=True) == {name.rstrip("."): 1}
    for thorough in (True, False):
        different = [c for c in verify(source, tmp_path / "counted", thorough=thorough).comparisons if not c.equal]
        assert [comparison.name for comparison in different] == [name.rstrip(".")]


def test_dense_glm_is_mlx_s_by_what_its_files_say(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "glm-4-moe", dense_layers=3)
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    assert any("MTP" in note for note in verify(source, tmp_path / "out").notes)


def test_a_declaration_that_mlx_lm_does_not_look_at_is_found(int4: Path, mlx: Path, tmp_path: Path) -> None:
    shutil.copytree(mlx, tmp_path / "out", ignore=shutil.ignore_patterns(".kconvert"))
    config = json.loads((mlx / "config.json").read_text())
    del config["quantization"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match="has no 'quantization', by which mlx-lm loads"):
        verify(int4, tmp_path / "out")


def test_glm_4_says_what_mlx_lm_wants_to_read(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "glm-4-moe")
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] is None


def test_of_one_type_of_models_only_the_one_that_mlx_lm_reads_is_written(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "ling-3")
    convert(plan(source, Recipe("mlx")), tmp_path / "out")
    assert verify(source, tmp_path / "out").faults == ()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BailingMoeV2_5ForCausalLM"]}))
    with pytest.raises(KconvertError, match=r"is a bailing_hybrid, and mlx-lm 0\.32\.2 has no class"):
        plan(source, Recipe("mlx"))


def test_a_model_that_mlx_lm_does_not_know_is_refused_in_one_sentence(tmp_path: Path) -> None:
    source = sample(tmp_path / "source", "step-3")
    with pytest.raises(KconvertError, match=r"is a step3p5, and mlx-lm 0\.32\.2 has no class"):
        plan(source, Recipe("mlx"))


def test_the_plan_misses_a_tokenizer_that_is_not_there(int4: Path, int4_copy: Path) -> None:
    for name in ("tokenizer.json", "tiktoken.model"):
        (int4_copy / name).unlink()
    said = [
        any("no tokenizer" in note for note in plan(root, Recipe("mlx")).facts["notes"]) for root in (int4, int4_copy)
    ]
    assert said == [False, True]


def test_scales_in_f32_are_for_mlx_alone() -> None:
    with pytest.raises(KconvertError, match="--scales f32 is for mlx"):
        Recipe("int4", scales="f32")


def as_mlx_lm_writes(root: Path, bf16: Path, group: int = 32) -> tuple[Path, Weights]:
    """A Qwen3 whose every matrix is quantised, the router in eight bits; and its values."""
    from safetensors.torch import save_file

    tensors, values = {}, {}
    for number, (name, tensor) in enumerate(sorted(weights(bf16).items())):
        if tensor.ndim < 2:
            tensors[name] = values[name] = tensor
            continue
        bits, size = (8, 64) if name.endswith("mlp.gate.weight") else (4, group)
        parts = affine(*tensor.shape, bits, size, torch.bfloat16, number)
        values[name] = value(parts, size)
        tensors |= {
            f"{name.removesuffix('weight')}{suffix}": parts[suffix] for suffix in ("weight", "scales", "biases")
        }
    for name in [name for name in tensors if ".experts.0." in name]:
        members = [tensors.pop(name.replace(".experts.0.", f".experts.{expert}.")) for expert in range(4)]
        stacked = torch.stack([member.view(torch.int32) if "weight" in name else member for member in members])
        tensors[name.replace(".experts.0.", ".switch_mlp.")] = (
            stacked.view(torch.uint32) if "weight" in name else stacked
        )
    root.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors", {"format": "mlx"}
    )
    config = json.loads((bf16 / "config.json").read_text())
    gates = {f"model.layers.{layer}.mlp.gate": {"group_size": 64, "bits": 8} for layer in range(3)}
    table = {"group_size": group, "bits": 4, "mode": "affine", **gates}
    (root / "config.json").write_text(json.dumps({**config, "quantization": table, "quantization_config": table}))
    return root, values


@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_mlx_lm_wrote_becomes_bf16_and_verifies(tmp_path: Path, group: int) -> None:
    source, values = as_mlx_lm_writes(tmp_path / "mlx", sample(tmp_path / "bf16", "qwen3-moe"), group)
    labels = {weight.format.label for weight in inspect(source).weights}
    assert labels == {f"mlx int4 group {group}", "mlx int8 group 64"}
    convert(plan(source, Recipe("bf16")), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == values.keys()
    assert all(found[name].equal(tensor) for name, tensor in values.items())
    assert verify(source, tmp_path / "out").faults == ()


def test_a_cut_of_what_mlx_lm_wrote_has_the_routers_rows_of_its_experts(tmp_path: Path) -> None:
    source, values = as_mlx_lm_writes(tmp_path / "mlx", sample(tmp_path / "bf16", "qwen3-moe"))
    convert(plan_cut(open_checkpoint(source), SampleRecipe(sizes={"layers": 2, "experts": 3})), tmp_path / "cut")
    convert(plan(tmp_path / "cut", Recipe("bf16")), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == {name for name in values if ".layers.2." not in name and ".experts.3." not in name}
    for name, tensor in found.items():
        assert tensor.equal(values[name][:3] if name.endswith("mlp.gate.weight") else values[name])


@pytest.mark.parametrize(
    ("key", "wrong"), [("bits", 7), ("group_size", 48), ("mode", "nvfp4"), ("bits", -1), ("mode", 3)]
)
def test_a_table_that_makes_no_sense_is_refused_in_one_sentence(tmp_path: Path, key: str, wrong: object) -> None:
    source, _ = as_mlx_lm_writes(tmp_path / "mlx", sample(tmp_path / "bf16", "qwen3-moe"))
    config = json.loads((source / "config.json").read_text())
    for table in (config["quantization"], config["quantization_config"]):
        table[key] = wrong
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(KconvertError, match=r"not supported|is not read|belongs there"):
        plan(source, Recipe("bf16"))
