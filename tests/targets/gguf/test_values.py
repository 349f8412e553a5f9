"""Every value of a GGUF, as gguf's numpy dequantises it, is that of the source."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from kconvert import KconvertError, Recipe, convert, plan, verify
from kconvert.targets.sample import SampleRecipe, plan_synthetic

Source = Callable[[str], Path]
ToGguf = Callable[..., Any]
MODELS = ["kimi-k2-thinking", "kimi-k2.5", "deepseek-v3", "deepseek-v3.2", "qwen3-moe", "glm-4-moe"]
PROJECTIONS = ("gate", "up", "down")
# llama.cpp's names -> what stands in a layer.
PLAIN = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    **{f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"},
    "indexer.attn_q_b.weight": "self_attn.indexer.wq_b.weight",
    "indexer.attn_k.weight": "self_attn.indexer.wk.weight",
    "indexer.proj.weight": "self_attn.indexer.weights_proj.weight",
    "indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn_{p}.weight": f"mlp.{p}_proj.weight" for p in PROJECTIONS},
    **{f"ffn_{p}_shexp.weight": f"mlp.shared_experts.{p}_proj.weight" for p in PROJECTIONS},
}


def loaded(root: Path) -> dict[str, torch.Tensor]:
    tensors = {name: t for path in sorted(root.glob("*.safetensors")) for name, t in load_file(path).items()}
    return {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}


def in_bf16(root: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The source's values, in F32."""
    try:
        convert(plan(root, Recipe("bf16")), tmp_path / "bf16")
    except KconvertError:  # there is nothing to convert
        return {name: tensor.float() for name, tensor in loaded(root).items()}
    return {name: tensor.float() for name, tensor in loaded(tmp_path / "bf16").items()}


def exact(root: Path, weight: str) -> torch.Tensor:
    """codes times scales of INT4, unrounded."""
    tensors = loaded(root)
    words = tensors[f"{weight}.weight_packed"]
    codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15).flatten(1) - 8
    scale = tensors[f"{weight}.weight_scale"].float()
    return codes * scale.repeat_interleave(32, 1)


@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_the_sources(source: Source, to_gguf: ToGguf, tmp_path: Path, name: str) -> None:
    root = source(name)
    read, values = to_gguf(root), in_bf16(root, tmp_path)
    wanted = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    wanted["output.weight"] = "lm_head.weight"
    for layer in range(2):
        wanted |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in PLAIN.items()}
        if name == "glm-4-moe":
            wanted[f"blk.{layer}.post_attention_norm.weight"] = wanted.pop(f"blk.{layer}.ffn_norm.weight")
    seen = set()
    for ours, theirs in wanted.items():
        if theirs in values:
            assert (read.values(ours) == values[theirs].numpy()).all(), ours
            seen.add(ours)
    for layer in range(2):
        for projection in PROJECTIONS:
            stack = f"blk.{layer}.ffn_{projection}_exps.weight"
            if stack in read.tensors:
                experts = [f"model.layers.{layer}.mlp.experts.{e}.{projection}_proj" for e in range(4)]
                if name.startswith("kimi"):
                    expected = torch.stack([exact(root, expert) for expert in experts])
                else:
                    expected = torch.stack([values[f"{expert}.weight"] for expert in experts])
                assert (read.values(stack) == expected.numpy()).all(), stack
                assert read.type(stack) == ("Q4_0" if name.startswith("kimi") else "BF16")
                seen.add(stack)
        if f"blk.{layer}.attn_k_b.weight" in read.tensors:
            kv_b = values[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].view(2, -1, 32)
            k, v = kv_b.split([128, 128], dim=1)
            assert (read.values(f"blk.{layer}.attn_k_b.weight") == k.transpose(1, 2).numpy()).all()
            assert (read.values(f"blk.{layer}.attn_v_b.weight") == v.numpy()).all()
            seen |= {f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight"}
    assert seen == read.tensors.keys()


@pytest.mark.parametrize("name", [*MODELS, "gpt-oss", "minimax-m2", "glm-5", "glm-5.3"])
def test_verify_finds_every_value_and_key(source: Source, to_gguf: ToGguf, tmp_path: Path, name: str) -> None:
    root = source(name)
    to_gguf(root)
    verify(root, tmp_path / "gguf")


@pytest.mark.parametrize("name", [*MODELS, "gpt-oss", "minimax-m2"])
def test_norms_and_routers_are_f32_and_other_matrices_bf16(source: Source, to_gguf: ToGguf, name: str) -> None:
    read = to_gguf(source(name))
    for tensor in read.tensors:
        is_f32 = "norm" in tensor or "_inp" in tensor or tensor.endswith("bias") or "sinks" in tensor
        if "_exps" not in tensor or is_f32:
            assert read.type(tensor) == ("F32" if is_f32 else "BF16"), tensor


def test_gpt_oss_has_gate_and_up_apart_in_its_own_codes(source: Source, to_gguf: ToGguf) -> None:
    root = source("gpt-oss")
    read, tensors = to_gguf(root), loaded(root)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for ours, name, turn in (("gate", "gate_up", 0), ("up", "gate_up", 1), ("down", "down", None)):
            rows = slice(None) if turn is None else slice(turn, None, 2)
            codes, scales = (tensors[f"{experts}.{name}_proj_{part}"][:, rows] for part in ("blocks", "scales"))
            flat = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)  # [experts, rows, groups, 32]
            blocks = torch.cat([scales.unsqueeze(-1), flat[..., :16] | flat[..., 16:] << 4], -1)
            expected = quants.dequantize(blocks.numpy().reshape(-1, 17), Type.MXFP4)
            stack = f"blk.{layer}.ffn_{ours}_exps"
            assert read.type(f"{stack}.weight") == "MXFP4"
            assert (read.values(f"{stack}.weight") == expected.reshape(*flat.shape[:2], -1)).all()
            bias = tensors[f"{experts}.{name}_proj_bias"].float()[:, rows]
            assert (read.values(f"{stack}.bias") == bias.numpy()).all()
        sinks = tensors[f"model.layers.{layer}.self_attn.sinks"].float()
        assert (read.values(f"blk.{layer}.attn_sinks.weight") == sinks.numpy()).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_rest_as_q8_0_is_what_gguf_makes_of_it(source: Source, to_gguf: ToGguf, tmp_path: Path, name: str) -> None:
    root = source(name)
    read, values = to_gguf(root, rest="q8_0"), in_bf16(root, tmp_path)
    for ours, theirs in (("token_embd", "embed_tokens"), ("blk.1.attn_output", "layers.1.self_attn.o_proj")):
        blocks = quants.quantize(values[f"model.{theirs}.weight"].numpy(), Type.Q8_0)
        assert (read.tensors[f"{ours}.weight"].data == blocks).all()
    assert read.type("blk.1.ffn_gate_inp.weight") == "F32"
    assert read.type("blk.1.ffn_up_exps.weight") == ("Q4_0" if name.startswith("kimi") else "Q8_0")
    if "blk.1.attn_k_b.weight" in read.tensors:
        k = values["model.layers.1.self_attn.kv_b_proj.weight"].view(2, -1, 32)[:, :128].transpose(1, 2)
        blocks = quants.quantize(np.ascontiguousarray(k), Type.Q8_0)
        assert (read.tensors["blk.1.attn_k_b.weight"].data == blocks).all()


def test_splits_hold_the_same_tensors(source: Source, to_gguf: ToGguf, tmp_path: Path) -> None:
    root = source("kimi-k2-thinking")
    whole = {name: tensor.data.tobytes() for name, tensor in to_gguf(root).tensors.items()}
    shutil.rmtree(tmp_path / "gguf")
    read = to_gguf(root, shard_size=100_000)
    total = len(read.files)
    assert total > 2
    assert [path.name for path in read.files] == [
        f"kimi-k2-thinking-{n:05d}-of-{total:05d}.gguf" for n in range(1, total + 1)
    ]
    assert {name: tensor.data.tobytes() for name, tensor in read.tensors.items()} == whole
    for number, reader in enumerate(read.readers):
        facts = {key: field.contents() for key, field in reader.fields.items() if key.startswith("split.")}
        assert facts == {"split.no": number, "split.count": total, "split.tensors.count": len(whole)}


def test_a_scale_that_f16_has_not_is_counted_or_refused(
    source: Source, kconvert: Any, tmp_path: Path, raw: Any
) -> None:
    checkpoint = raw.load(Path(shutil.copytree(source("kimi-k2-thinking"), tmp_path / "source")))
    weight = "model.layers.1.mlp.experts.2.up_proj"
    tensor = checkpoint[f"{weight}.weight_scale"]
    tensor.data = struct.pack("<H", 0x3001) + tensor.data[2:]  # 2^-31 and a bit
    root = checkpoint.save()
    assert convert(plan(root, Recipe("gguf")), tmp_path / "out") == {weight: 1}
    said = kconvert("convert", root, tmp_path / "said", "--to", "gguf").stdout
    assert f"F16 has not the scales of 1 group in 1 weight, which got the nearest; first in {weight!r}" in said
    with pytest.raises(KconvertError, match=rf"{weight}.*1 of its groups has scales that F16 has not"):
        convert(plan(root, Recipe("gguf", require_exact=True)), tmp_path / "exact")


@pytest.mark.parametrize("value", [b"\x80\x47", b"\x80\xc7"], ids=["65536", "-65536"])
def test_a_scale_that_f16_cannot_hold_is_refused_and_nothing_is_left(
    int4_copy: Path, tmp_path: Path, raw: Any, kconvert: Any, value: bytes
) -> None:
    weight, out = "model.layers.2.mlp.experts.1.down_proj", tmp_path / "out"
    checkpoint = raw.load(int4_copy)
    scale = checkpoint[f"{weight}.weight_scale"]
    scale.data = scale.data[:8] + value + scale.data[10:]
    checkpoint.save()
    for option in ((), ("--check-first",)):
        said = kconvert("convert", int4_copy, out, "--to", "gguf", *option)
        assert said.returncode == 2
        assert len(said.stderr.splitlines()) == 1
        assert f"weight '{weight}' cannot be written as q4_0: it has the scale " in said.stderr
        assert "65536, which F16 cannot hold" in said.stderr
        assert "convert it --to bf16 first" in said.stderr
        assert not out.exists()
    out.mkdir()
    assert kconvert("convert", int4_copy, out, "--to", "gguf").returncode == 2
    assert list(out.iterdir()) == []


def test_with_check_first_such_a_scale_is_found_before_a_shard_is_written(
    int4_copy: Path, tmp_path: Path, raw: Any
) -> None:
    checkpoint = raw.load(int4_copy)
    scale = checkpoint["model.layers.2.mlp.experts.3.up_proj.weight_scale"]
    scale.data = scale.data[:-2] + b"\x80\x47"
    checkpoint.save()
    parts = plan(int4_copy, Recipe("gguf", shard_size=300_000))
    with pytest.raises(KconvertError, match="F16 cannot hold"):
        convert(parts, tmp_path / "first", check_first=True)
    assert not (tmp_path / "first").exists()
    with pytest.raises(KconvertError, match="F16 cannot hold"):
        convert(parts, tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {"", ".gguf"}  # what is sound stays
    with pytest.raises(KconvertError, match="run the conversion again"):
        verify(int4_copy, tmp_path / "out")


def test_the_way_by_bf16_takes_such_a_scale(int4_copy: Path, tmp_path: Path, raw: Any, to_gguf: ToGguf) -> None:
    checkpoint = raw.load(int4_copy)
    scale = checkpoint["model.layers.2.mlp.experts.3.up_proj.weight_scale"]
    scale.data = scale.data[:-2] + b"\x80\x47"
    checkpoint.save()
    convert(plan(int4_copy, Recipe("bf16")), tmp_path / "bf16")
    assert to_gguf(tmp_path / "bf16").type("blk.2.ffn_up_exps.weight") == "BF16"
    assert to_gguf(tmp_path / "bf16", rest="q8_0").type("blk.2.ffn_up_exps.weight") == "Q8_0"
    verify(tmp_path / "bf16", tmp_path / "gguf")


def test_a_value_too_large_for_q8_0_is_named(source: Source, tmp_path: Path) -> None:
    root = Path(shutil.copytree(source("qwen3-moe"), tmp_path / "copy"))
    for path in root.glob("*.safetensors"):
        tensors = load_file(path)
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = -1e7
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(KconvertError, match=r"o_proj.*it has the value -10027008, .*leave out --rest q8_0"):
        convert(plan(root, Recipe("gguf", rest="q8_0")), tmp_path / "out")


def test_rows_that_q8_0_has_no_blocks_for_are_bf16_without_it(tmp_path: Path) -> None:
    sizes = {"layers": 1, "experts": 2, "hidden": 128, "vocab": 320, "heads": 4, "moe_intermediate": 48}
    convert(plan_synthetic(SampleRecipe("qwen3-moe", sizes)), tmp_path / "source")
    sentence = r"down_proj' has 48 columns, which do not divide into blocks of 32; leave out --rest q8_0"
    with pytest.raises(KconvertError, match=sentence):
        plan(tmp_path / "source", Recipe("gguf", rest="q8_0"))
    convert(plan(tmp_path / "source", Recipe("gguf")), tmp_path / "out")


def test_one_file_that_replaces_another_leaves_nothing_of_it(source: Source, to_gguf: ToGguf, tmp_path: Path) -> None:
    root = source("kimi-k2-thinking")
    to_gguf(root)
    assert len(to_gguf(root, shard_size=100_000).files) > 2
    assert not (tmp_path / "gguf" / "kimi-k2-thinking.gguf").exists()
    assert len(to_gguf(root).files) == 1
