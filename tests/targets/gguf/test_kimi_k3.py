"""Kimi-K3 as llama.cpp's kimi-k3: every tensor under its name, those that are computed by torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kconvert import CheckFailed, KconvertError, Recipe, convert, plan, verify

Source = Callable[[str], Path]
ToGguf = Callable[..., Any]
PROJECTIONS = ("gate", "up", "down")
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    **{f"attn_{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkv"},
    **{f"ssm_conv1d_{part}.weight": f"self_attn.{part}_conv1d.weight" for part in "qkv"},
    "attn_output.weight": "self_attn.o_proj.weight",
    "ssm_f_a.weight": "self_attn.f_a_proj.weight",
    "ssm_f_b.weight": "self_attn.f_b_proj.weight",
    "ssm_beta.weight": "self_attn.b_proj.weight",
    "ssm_dt.bias": "self_attn.dt_bias",
    "ssm_norm.weight": "self_attn.o_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
    "exp_probs_b.bias": "block_sparse_moe.gate.e_score_correction_bias",
    "ffn_routed_down.weight": "block_sparse_moe.routed_expert_down_proj.weight",
    "ffn_routed_up.weight": "block_sparse_moe.routed_expert_up_proj.weight",
    "ffn_routed_norm.weight": "block_sparse_moe.routed_expert_norm.weight",
    **{f"ffn_{p}.weight": f"mlp.{p}_proj.weight" for p in PROJECTIONS},
    **{f"ffn_{p}_shexp.weight": f"block_sparse_moe.shared_experts.{p}_proj.weight" for p in PROJECTIONS},
}


def in_bf16(root: Path, out: Path) -> dict[str, torch.Tensor]:
    convert(plan(root, Recipe("bf16")), out)
    tensors = {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return {name.removeprefix("language_model."): tensor.float() for name, tensor in tensors.items()}


def test_every_value_is_the_sources_or_computed_of_them(source: Source, to_gguf: ToGguf, tmp_path: Path) -> None:
    read, values = to_gguf(source("kimi-k3")), in_bf16(source("kimi-k3"), tmp_path / "bf16")
    wanted = {
        "token_embd.weight": values["model.embed_tokens.weight"],
        "output_norm.weight": values["model.norm.weight"],
        "output.weight": values["lm_head.weight"],
        "output_res_score.weight": values["model.output_attn_res_norm.weight"]
        * values["model.output_attn_res_proj.weight"][0],
    }
    for n in range(4):
        layer = f"model.layers.{n}"
        wanted |= {
            f"blk.{n}.{ours}": values[f"{layer}.{theirs}"]
            for ours, theirs in LAYER.items()
            if f"{layer}.{theirs}" in values
        }
        for ours, theirs in (("attn", "self_attention"), ("ffn", "mlp")):
            norm, projection = (values[f"{layer}.{theirs}_res_{part}.weight"] for part in ("norm", "proj"))
            wanted[f"blk.{n}.{ours}_res_score.weight"] = norm * projection[0]
        wanted[f"blk.{n}.{'attn_gate' if n == 3 else 'ssm_g'}.weight"] = values[f"{layer}.self_attn.g_proj.weight"]
        if n < 3:
            wanted[f"blk.{n}.ssm_a"] = -values[f"{layer}.self_attn.A_log"].double()[:2].exp().float()
        if n > 0:
            for name, w in zip(PROJECTIONS, ("w1", "w3", "w2"), strict=True):
                experts = [values[f"{layer}.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(4)]
                wanted[f"blk.{n}.ffn_{name}_exps.weight"] = torch.stack(experts)
                assert read.type(f"blk.{n}.ffn_{name}_exps.weight") == "MXFP4"
    k, v = values["model.layers.3.self_attn.kv_b_proj.weight"].view(2, -1, 32).split([128, 128], dim=1)
    wanted |= {"blk.3.attn_k_b.weight": k.transpose(1, 2), "blk.3.attn_v_b.weight": v}
    assert wanted.keys() == read.tensors.keys()
    for name, expected in wanted.items():
        assert (read.values(name) == expected.numpy()).all(), name


def test_the_plan_says_what_is_computed(source: Source) -> None:
    facts = plan(source("kimi-k3"), Recipe("gguf")).facts
    assert facts["tensors"]["computed of the source's values, as llama.cpp wants them"] == 2 * 4 + 1 + 3
    assert not any("res_proj" in name for name in facts["dropped"])


def test_nothing_is_rounded_otherwise(source: Source) -> None:
    assert plan(source("kimi-k3"), Recipe("gguf", require_exact=True)).steps


def test_it_says_which_layers_remember_by_delta_attention(source: Source, to_gguf: ToGguf) -> None:
    read = to_gguf(source("kimi-k3"))
    wanted = {
        "attention.head_count_kv": [0, 0, 0, 1],
        "attention.key_length": 96,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "kda.head_dim": 128,
        "kda.gate_lower_bound": -5.0,
        "ssm.conv_kernel": 4,
        "expert_latent_length": 64,
        "expert_gating_func": 2,
        "attn_res.block_size": 12,
        "activation.situ_linear_beta": 25.0,
    }
    assert {key: read[f"kimi-k3.{key}"] for key in wanted} == wanted
    assert read["tokenizer.ggml.pre"] == "kimi-k2"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu', but llama.cpp needs 'situ' there"),
        ({"num_experts_per_token": 5}, "num_experts_per_token is 5, but .* from 1 to the 4 of num_experts"),
        ({"activation_situ_beta": None}, "activation_situ_beta is missing, but llama.cpp needs a number there"),
    ],
)
def test_a_config_that_llama_cpp_cannot_follow_is_refused(
    source: Source, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    root = shutil.copytree(source("kimi-k3"), tmp_path / "kimi-k3", ignore=shutil.ignore_patterns(".kconvert"))
    config = json.loads((root / "config.json").read_text())
    config["text_config"] |= changes
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(KconvertError, match=sentence):
        plan(root, Recipe("gguf"))


def test_verify_finds_every_value_and_key(source: Source, to_gguf: ToGguf, tmp_path: Path) -> None:
    to_gguf(source("kimi-k3"))
    verify(source("kimi-k3"), tmp_path / "gguf")


@pytest.mark.parametrize(
    "tensor", ["blk.1.ssm_a", "blk.2.ffn_res_score.weight", "blk.3.attn_gate.weight", "blk.1.ssm_conv1d_k.weight"]
)
def test_verify_places_a_flipped_bit(source: Source, to_gguf: ToGguf, tmp_path: Path, tensor: str) -> None:
    read = to_gguf(source("kimi-k3"))
    data = bytearray(read.files[0].read_bytes())
    data[int(read.tensors[tensor].data_offset)] ^= 1
    read.files[0].write_bytes(data)
    with pytest.raises(CheckFailed, match=rf"'{tensor}' differs at \[0, 0\]"):
        verify(source("kimi-k3"), tmp_path / "gguf")


def test_llama_cpp_loads_it_and_its_logits_are_finite(source: Source, to_gguf: ToGguf) -> None:
    """transformers has no such model, so there is nobody to compare the logits with."""
    pytest.importorskip("llama_cpp")
    (file,) = to_gguf(source("kimi-k3")).files
    code = (
        "import sys, numpy; from llama_cpp import Llama; m = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False);"
        "m.eval([7, 42, 99, 3]); x = m.scores[:4]; assert numpy.isfinite(x).all() and x.std(1).min() > 0.01"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
