"""A step of rollouts: an export of all that there is, the patch of what changed, and that merged; seconds and bytes of each.

    python benchmarks/qat_patch.py [--experts 16] [--changed 0.25]

A model with experts of Qwen3-235B-A22B's shape on INT4; between exports the share `--changed` of its experts is trained. Whole
exports and patches take turns; each patch is merged into the export before it, and the result compared, byte for byte, with an
export of everything.
"""

from __future__ import annotations

import filecmp
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import GB, arguments, machine, nbytes, remove, spread, table

SIZES = {
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 128,
}
REST = {"num_key_value_heads": 2, "vocab_size": 1024, "intermediate_size": 1536, "num_experts_per_tok": 2}


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=16, help="of each of two layers [16]")
    parser.add_argument("--changed", type=float, default=0.25, help="share of the experts that a step changes [0.25]")
    options = parser.parse_args()
    import torch

    import kconvert
    from kconvert_qat import export

    folders = {name: options.dir / f"patch-{name}" for name in ("rollouts", "whole", "patch")}
    rollouts, whole, patch = folders.values()
    model = made(options.experts)
    seconds: dict[str, list[float]] = {"whole export": [], "patch": [], "apply": []}
    try:
        export(model, rollouts, overwrite=True)
        for run in range(options.runs):
            change(model, options.changed, run)
            seconds["patch"].append(timed(lambda: export(model, patch, only_changed=True, overwrite=True)))
            seconds["apply"].append(timed(lambda: kconvert.apply(rollouts, patch)))
            remembered = vars(model)["_kconvert_exported"]
            seconds["whole export"].append(timed(lambda: export(model, whole, overwrite=True)))
            vars(model)["_kconvert_exported"] = remembered  # the next patch follows what the rollouts have
            compare(rollouts, whole)
        sizes = {"whole export": size(whole), "patch": size(patch), "apply": size(patch)}
    finally:
        for folder in folders.values():
            remove(folder)
    rows = [
        [name, spread(times, 2, "s"), f"{sizes[name] / 1e6:,.0f} MB", f"{sizes[name] / median(times) / GB:.2f} GB/s"]
        for name, times in seconds.items()
    ]
    table([f"{options.changed:.0%} of {2 * options.experts} experts changed", "seconds", "written", ""], rows)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    machine(options.dir)


def made(experts: int) -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from kconvert_qat import prepare

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, **REST, num_experts=experts)
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    prepare(model)
    return model


def change(model: Any, share: float, run: int) -> None:
    """A step of an optimiser that reaches some experts of each layer, and the norms."""
    import torch

    torch.manual_seed(run)
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            for number in torch.randperm(len(experts.down_proj))[: max(1, round(share * len(experts.down_proj)))]:
                for weight in (experts.gate_up_proj, experts.down_proj):
                    weight[number] += torch.randn_like(weight[number]) * weight[number].std() * 0.1
            layer.input_layernorm.weight += 0.01


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(mine: Path, wanted: Path) -> None:
    for file in wanted.glob("*.safetensors"):
        assert filecmp.cmp(file, mine / file.name, shallow=False), (
            f"{mine / file.name} is not what a whole export writes"
        )


def size(folder: Path) -> int:
    return nbytes(path for path in folder.iterdir() if path.is_file())


if __name__ == "__main__":
    main()
