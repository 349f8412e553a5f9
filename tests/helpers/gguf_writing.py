"""GGUF files as a stranger makes them of Kimi-K2's INT4 checkpoints: numpy, torch and gguf's writer, nothing of the product."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

Tensors = dict[str, tuple[Any, gguf.GGMLQuantizationType]]
Types = gguf.GGMLQuantizationType

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
}


def read(root: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in root.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def q4_0(packed: torch.Tensor, scale: torch.Tensor) -> np.ndarray[Any, Any]:
    """Words [rows, cols / 8] and bf16 scales [rows, cols / 32] as blocks [rows, cols / 32 * 18]."""
    codes = torch.stack([packed >> 4 * n & 15 for n in range(8)], -1).view(len(packed), -1, 2, 16).to(torch.uint8)
    scales = scale.half().view(torch.uint8).view(len(packed), -1, 2)
    return torch.cat([scales, codes[:, :, 0] | codes[:, :, 1] << 4], -1).view(len(packed), -1).numpy()


def dense(tensor: torch.Tensor) -> tuple[np.ndarray[Any, Any], Types]:
    """BF16; norms, vectors and the router in F32, as llama.cpp has them."""
    if tensor.dtype == torch.float32 or tensor.ndim < 2:
        return tensor.float().numpy(), Types.F32
    return tensor.contiguous().view(torch.uint8).numpy(), Types.BF16


def from_int4(root: Path, layers: int, experts: int) -> Tensors:
    """The tensors of the file for the checkpoint in `root`."""
    config = json.loads((root / "config.json").read_text())
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    source, made = read(root), {}
    for name, tensor in source.items():
        match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)", name)
        assert match is not None
        prefix, rest = f"blk.{match[1]}." if match[1] else "", match[2]
        if rest == "self_attn.kv_b_proj.weight":
            k, v = tensor.view(-1, nope + value, tensor.shape[1]).split([nope, value], 1)
            made[f"{prefix}attn_k_b.weight"] = dense(k.transpose(1, 2))
            made[f"{prefix}attn_v_b.weight"] = dense(v)
        elif rest == "mlp.gate.weight":
            made[f"{prefix}ffn_gate_inp.weight"] = tensor.float().numpy(), Types.F32
        elif rest in NAMES:
            made[prefix + NAMES[rest]] = dense(tensor)
        else:
            assert ".experts." in rest, rest
    for layer in range(layers):
        for part in ("gate", "up", "down"):
            stems = [f"model.layers.{layer}.mlp.experts.{n}.{part}_proj" for n in range(experts)]
            if f"{stems[0]}.weight_packed" in source:
                blocks = [q4_0(source[f"{stem}.weight_packed"], source[f"{stem}.weight_scale"]) for stem in stems]
                made[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack(blocks), Types.Q4_0
    return made


def from_plain(root: Path, architecture: str, layers: int) -> Tensors:
    """The tensors of the file for a checkpoint whose values are plain, by gguf's own table of names."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    source = read(root)
    made: Tensors = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in source.items():
        whole = re.sub(r"[.]experts[.]([0-9]+)[.]", ".experts.", name)
        whole = whole.replace("e_score_correction_bias", "e_score_correction.bias")
        found = table.get_name(whole, (".weight", ".bias"))
        if found is None:
            continue
        if match := re.search(r"[.]experts[.]([0-9]+)[.]", name):
            stacks.setdefault(found, {})[int(match[1])] = tensor
        else:
            made[found] = dense(tensor)
    for found, matrices in stacks.items():
        made[found] = dense(torch.stack([matrices[number] for number in sorted(matrices)]))
    return made


def write(path: Path, tensors: Tensors, architecture: str = "deepseek2", parts: int = 1) -> Path:
    """One file, or the first of several."""
    names = list(tensors)
    paths = (
        [path.with_name(f"{path.stem}-{n + 1:05d}-of-{parts:05d}.gguf") for n in range(parts)] if parts > 1 else [path]
    )
    for number, place in enumerate(paths):
        writer = gguf.GGUFWriter(place, architecture)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(names))
        for name in names[number::parts]:
            data, kind = tensors[name]
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]


def rewritten(path: Path, edit: Callable[[Tensors], Any], to: Path) -> Path:
    """A copy of a file in which `edit` has changed the tensors."""
    tensors: Tensors = {
        tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    edit(tensors)
    return write(to, tensors)


def as_type(kind: Types) -> Callable[[Mapping[str, Any], str], None]:
    """Quantise a tensor that is BF16."""

    def edit(tensors: Any, name: str) -> None:
        values = gguf.quants.dequantize(*tensors[name])
        tensors[name] = gguf.quants.quantize(values, kind), kind

    return edit
