"""How far kt-kernel's output of a layer's experts is from torch's of the same weights in F32, as a share of its norm.

python by_kt.py DIR METHOD BF16_TWIN RESULT.json; of packed weights the twin has what they dequantise to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
from amx_oracle import METHODS, PROJECTIONS, dequantise, forward

Experts = list[list[torch.Tensor]]  # gate, up and down, F32, of each


def of_values(root: Path, layer: int, count: int) -> Experts:
    tensors = {}
    for file in root.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if ".mlp.experts." in name]  # noqa: SIM118  no dict
            tensors |= {name: opened.get_tensor(name).float() for name in names}
    prefix = f"model.layers.{layer}.mlp.experts"
    return [[tensors[f"{prefix}.{expert}.{kind}_proj.weight"] for kind in PROJECTIONS] for expert in range(count)]


def of_packed(root: Path, method: str, layer: int, shapes: list[tuple[int, int]], count: int) -> Experts:
    parts = {}
    for file in root.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            names = [name for name in opened.keys() if name.startswith(f"blk.{layer}.ffn_")]  # noqa: SIM118  no dict
            parts |= {name: opened.get_tensor(name) for name in names}

    def matrix(expert: int, kind: str, shape: tuple[int, int]) -> torch.Tensor:
        stem = f"blk.{layer}.ffn_{kind}_exps.{expert}.numa.0"
        return torch.from_numpy(dequantise(parts[f"{stem}.weight"], parts[f"{stem}.scale"], method, *shape))

    return [[matrix(expert, *pair) for pair in zip(PROJECTIONS, shapes, strict=True)] for expert in range(count)]


def moe(experts: Experts, tokens: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """F32 [tokens, hidden]."""
    output = torch.zeros(tokens.shape)
    for row, token in enumerate(tokens.float()):
        for expert, share in zip(ids[row].tolist(), shares[row], strict=True):
            gate, up, down = experts[expert]
            output[row] += share * (down @ (torch.nn.functional.silu(gate @ token) * (up @ token)))
    return output


def main(root: str, method: str, twin: str, result: str) -> None:
    config = json.loads((Path(twin) / "config.json").read_text())
    layer, count, width = config["first_k_dense_replace"], config["n_routed_experts"], config["moe_intermediate_size"]
    hidden = config["hidden_size"]
    if method in METHODS:
        shapes = [(width, hidden), (width, hidden), (hidden, width)]
        experts = of_packed(Path(root), method, layer, shapes, count)
    else:
        experts = of_values(Path(twin), layer, count)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, hidden, generator=random).bfloat16()
    ids = torch.stack([torch.randperm(count, generator=random)[:2] for _ in tokens])
    shares = torch.rand(len(tokens), 2, generator=random)
    found = forward(Path(root), method, 1, count, width, tokens, ids, shares, layer=layer).float()
    expected = moe(experts, tokens, ids, shares)
    Path(result).write_text(json.dumps({"relative_error": float((found - expected).norm() / expected.norm())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
