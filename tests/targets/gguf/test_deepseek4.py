"""DeepSeek-V4 as llama.cpp's deepseek4: every tensor under its name, with the source's values, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from kconvert import CheckFailed, KconvertError, Recipe, convert, plan, verify

Source = Callable[[str], Path]
ToGguf = Callable[..., Any]
WHOLE = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
    "output_hc_fn.weight": "hc_head_fn",
    "output_hc_base.weight": "hc_head_base",
    "output_hc_scale.weight": "hc_head_scale",
}
LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "attn_sinks.weight": "attn.attn_sink",
    "attn_q_a.weight": "attn.wq_a.weight",
    "attn_q_a_norm.weight": "attn.q_norm.weight",
    "attn_q_b.weight": "attn.wq_b.weight",
    "attn_kv.weight": "attn.wkv.weight",
    "attn_kv_a_norm.weight": "attn.kv_norm.weight",
    "attn_output_a.weight": "attn.wo_a.weight",
    "attn_output_b.weight": "attn.wo_b.weight",
    "attn_compressor_kv.weight": "attn.compressor.wkv.weight",
    "attn_compressor_gate.weight": "attn.compressor.wgate.weight",
    "attn_compressor_ape.weight": "attn.compressor.ape",
    "attn_compressor_norm.weight": "attn.compressor.norm.weight",
    "indexer.attn_q_b.weight": "attn.indexer.wq_b.weight",
    "indexer.proj.weight": "attn.indexer.weights_proj.weight",
    "indexer_compressor_kv.weight": "attn.indexer.compressor.wkv.weight",
    "indexer_compressor_gate.weight": "attn.indexer.compressor.wgate.weight",
    "indexer_compressor_ape.weight": "attn.indexer.compressor.ape",
    "indexer_compressor_norm.weight": "attn.indexer.compressor.norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate_inp.weight": "ffn.gate.weight",
    "ffn_gate_tid2eid.weight": "ffn.gate.tid2eid",
    "exp_probs_b.bias": "ffn.gate.bias",
    "ffn_gate_shexp.weight": "ffn.shared_experts.w1.weight",
    "ffn_down_shexp.weight": "ffn.shared_experts.w2.weight",
    "ffn_up_shexp.weight": "ffn.shared_experts.w3.weight",
    **{f"hc_{side}_{part}.weight": f"hc_{side}_{part}" for side in ("attn", "ffn") for part in ("fn", "base", "scale")},
}
EXPERTS = {"gate": "w1", "down": "w2", "up": "w3"}


def loaded(root: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(root.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def values(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, torch.Tensor]]:
    """Those of a model in BF16."""

    def make(name: str) -> dict[str, torch.Tensor]:
        out = tmp_path_factory.mktemp(name) / "bf16"
        convert(plan(source(name), Recipe("bf16")), out)
        return loaded(out)

    return make


@pytest.mark.parametrize("name", ["deepseek-v4", "deepseek-v4-base"])
def test_every_value_is_the_sources(source: Source, to_gguf: ToGguf, values: Any, name: str) -> None:
    read, tensors = to_gguf(source(name)), values(name)
    wanted = WHOLE | {f"blk.{n}.{ours}": f"layers.{n}.{theirs}" for n in range(4) for ours, theirs in LAYER.items()}
    seen = {f"blk.{n}.ffn_{ours}_exps.weight" for n in range(4) for ours in EXPERTS}
    for n in range(4):
        for ours, theirs in EXPERTS.items():
            stack = torch.stack([tensors[f"layers.{n}.ffn.experts.{e}.{theirs}.weight"].float() for e in range(4)])
            assert (read.values(f"blk.{n}.ffn_{ours}_exps.weight") == stack.numpy()).all()
    for ours, theirs in wanted.items():
        if theirs in tensors and "tid2eid" not in ours:
            assert (read.values(ours) == tensors[theirs].float().numpy()).all(), ours
            seen.add(ours)
        elif theirs in tensors:
            assert (read.tensors[ours].data == tensors[theirs].numpy()).all(), ours
            seen.add(ours)
    assert seen == read.tensors.keys()


def test_experts_have_the_sources_codes_and_scales(source: Source, to_gguf: ToGguf) -> None:
    read, tensors = to_gguf(source("deepseek-v4")), loaded(source("deepseek-v4"))
    expert = "layers.3.ffn.experts.2.w2"
    codes, scale = tensors[f"{expert}.weight"].view(torch.uint8), tensors[f"{expert}.scale"].view(torch.uint8)
    flat = torch.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1, 32)
    blocks = torch.cat([scale.unsqueeze(-1), flat[..., :16] | flat[..., 16:] << 4], -1)
    assert read.type("blk.3.ffn_down_exps.weight") == "MXFP4"
    assert (read.tensors["blk.3.ffn_down_exps.weight"].data[2] == blocks.flatten(1).numpy()).all()


def test_what_small_tensors_hold_is_not_rounded(source: Source, to_gguf: ToGguf, values: Any) -> None:
    types = {
        "ffn_gate_tid2eid": "I32",
        "ffn_gate_inp": "F32",
        "hc_attn_fn": "F32",
        "attn_compressor_ape": "F32",
        "attn_compressor_gate": "BF16",
        "indexer.proj": "BF16",
        "attn_output_a": "Q8_0",
        "indexer.attn_q_b": "Q8_0",
        "ffn_up_exps": "MXFP4",
    }
    read = to_gguf(source("deepseek-v4"), rest="q8_0")
    assert {name: read.type(f"blk.2.{name}.weight") for name in types} == types
    blocks = quants.quantize(values("deepseek-v4")["layers.2.attn.wo_a.weight"].float().numpy(), Type.Q8_0)
    assert (read.tensors["blk.2.attn_output_a.weight"].data == blocks).all()


def test_it_says_how_attention_is_compressed_and_experts_are_chosen(source: Source, to_gguf: ToGguf) -> None:
    read = to_gguf(source("deepseek-v4"))
    wanted = {
        "block_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 128,
        "attention.compress_ratios": [0, 0, 4, 128],
        "attention.compress_rope_freq_base": 160000.0,
        "attention.indexer.head_count": 2,
        "attention.output_lora_rank": 32,
        "rope.freq_base": 10000.0,
        "rope.scaling.factor": 16.0,
        "rope.dimension_count": 64,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 20,
        "hash_layer_count": 3,
        "expert_gating_func": 4,
        "expert_weights_scale": 1.5,
        "swiglu_clamp_exp": [10.0] * 4,
        "embedding_length_out": 512,
    }
    assert {key: read[f"deepseek4.{key}"] for key in wanted} == wanted


@pytest.fixture
def copy(source: Source, tmp_path: Path) -> Path:
    """A copy of the small model, to damage."""
    ignored = shutil.ignore_patterns(".kconvert")
    return Path(shutil.copytree(source("deepseek-v4"), tmp_path / "deepseek-v4", ignore=ignored))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"compress_ratios": [0, 0, 4]},
            "compress_ratios is .* but llama.cpp needs 0, 4 or 128 for each of the 4 layers",
        ),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', not sqrtsoftplus"),
        ({"swiglu_limit": None}, "swiglu_limit is missing, but llama.cpp needs a number there"),
    ],
)
def test_a_config_that_llama_cpp_cannot_follow_is_refused(copy: Path, changes: dict[str, Any], sentence: str) -> None:
    config = {**json.loads((copy / "config.json").read_text()), **changes}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(KconvertError, match=sentence):
        plan(copy, Recipe("gguf"))


def test_an_expert_that_is_not_there_is_refused_in_the_table_of_tokens(copy: Path, tmp_path: Path) -> None:
    (path,) = copy.glob("*.safetensors")
    tensors = load_file(path)
    tensors["layers.1.ffn.gate.tid2eid"][7, 1] = 4
    save_file(tensors, path)
    with pytest.raises(KconvertError, match=r"tid2eid.* is 4 at \[7, 1\]"):
        convert(plan(copy, Recipe("gguf")), tmp_path / "out")


@pytest.mark.parametrize("name", ["deepseek-v4", "deepseek-v4-base"])
def test_verify_finds_every_value_and_key(source: Source, to_gguf: ToGguf, tmp_path: Path, name: str) -> None:
    to_gguf(source(name))
    verify(source(name), tmp_path / "gguf")


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ("blk.1.ffn_gate_tid2eid.weight", r"'blk.1.ffn_gate_tid2eid.weight' differs at \[0, 0\]"),
        ("blk.2.attn_compressor_ape.weight", r"'blk.2.attn_compressor_ape.weight' differs at \[0, 0\]"),
        ("blk.3.exp_probs_b.bias", r"'blk.3.exp_probs_b.bias' differs at \[0, 0\]"),
        ("blk.3.ffn_up_exps.weight", r"'blk.3.ffn_up_exps.weight\[0\]' differs at"),
    ],
)
def test_verify_places_a_flipped_bit(
    source: Source, to_gguf: ToGguf, tmp_path: Path, tensor: str, sentence: str
) -> None:
    read = to_gguf(source("deepseek-v4"))
    offset = int(read.tensors[tensor].data_offset)
    data = bytearray(read.files[0].read_bytes())
    data[offset + ("exps" in tensor)] ^= 1
    read.files[0].write_bytes(data)
    with pytest.raises(CheckFailed, match=sentence):
        verify(source("deepseek-v4"), tmp_path / "gguf")
