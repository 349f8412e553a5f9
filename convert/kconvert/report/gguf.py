"""What a user wants to know about a GGUF file: architecture, sizes, what its tensors are and of which types."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from typing import Any

from kconvert.checkpoint.gguf import BLOCKS, Array
from kconvert.checkpoint.gguf_files import GgufCheckpoint
from kconvert.errors import counted, human
from kconvert.report.summary import Summary, role_lines

PARTS = ("gate", "up", "down")
# What llama.cpp calls a tensor, without its layer and its last word -> the role.
ROLES = {
    **{"token_embd": "embedding", "output": "lm_head", "ffn_gate_inp": "router", "exp_probs_b": "router.bias"},
    **{"attn_output": "attention.o", "attn_kv_a_mqa": "attention.kv_a"},
    **dict.fromkeys(("attn_kv_b", "attn_k_b", "attn_v_b"), "attention.kv_b"),
    **{f"attn_{part}": f"attention.{part}" for part in ("q", "k", "v", "qkv", "q_a", "q_b", "gate", "sinks")},
    **{f"ffn_{part}": f"dense.{part}" for part in PARTS},
    **{f"ffn_{part}_shexp": f"shared.{part}" for part in PARTS},
    **{f"ffn_{part}_exps": f"expert.{part}" for part in (*PARTS, "gate_up")},
}
LAYER = re.compile(r"blk[.][0-9]+[.]")
SHOWN = 200  # characters of a value


def role_of(tensor: str) -> str:
    """The role of a tensor by its name in llama.cpp."""
    stem, _, last = LAYER.sub("", tensor, count=1).rpartition(".")
    if stem.startswith("nextn."):
        return "mtp"
    if stem.startswith(("v.", "mm.", "a.")):
        return "projector" if stem.startswith("mm.") else "vision"
    if stem.endswith("norm"):
        return "norm"
    role = ROLES.get(stem, "other")
    return f"{role}.bias" if last == "bias" and role not in ("other", "router.bias") else role


def summarise_gguf(checkpoint: GgufCheckpoint) -> Summary:
    """`kconvert inspect` of a GGUF file."""
    roles: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for tensor in checkpoint.tensors.values():
        size = math.prod(tensor.shape)
        roles[role_of(tensor.name), tensor.dtype].update(tensors=1, parameters=size, bytes=tensor.nbytes)
    table: list[dict[str, Any]] = [{"role": role, "format": dtype, **counts} for (role, dtype), counts in roles.items()]
    parameters = sum(row["parameters"] for row in table)
    unknown = sorted({row["format"] for row in table} - BLOCKS.keys())
    findings = [
        f"{dtype} is a type of tensors that is not known; its size is what lies before the next" for dtype in unknown
    ]
    facts = {
        "name": checkpoint.name,
        "architecture": checkpoint.architecture,
        "parameters": parameters,
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "roles": table,
        "metadata": {key: _spelled(value) for key, value in checkpoint.metadata.items()},
        "findings": findings,
    }
    lines = [
        f"{checkpoint.name}: GGUF of {checkpoint.architecture}, {parameters:,} parameters, {human(checkpoint.nbytes)} in "
        f"{counted(len(checkpoint.files), 'file')}, {counted(len(checkpoint.tensors), 'tensor')}",
        *role_lines(table, "type", "tensors", "tensors"),
        *(f"finding: {finding}" for finding in findings),
    ]
    return Summary(facts, tuple(lines))


def _spelled(value: Any) -> Any:
    """A value as JSON has it; of lists the length, of long texts the beginning."""
    if isinstance(value, Array):
        return counted(value.items, "item")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value[:SHOWN] if isinstance(value, str) else value
