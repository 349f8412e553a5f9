"""Quantisation-aware training on several GPUs or machines: FSDP2, micro-batches, patches for rollouts.

    torchrun --nproc-per-node 8 examples/qat_torchrun.py --model ./int4 --text corpus.txt --steps 100 --output ./trained

On several nodes the same line runs on each, with `--nnodes 4 --node-rank 0 --master-addr node0 --master-port 29500` before the
file. MODEL is a quantised checkpoint that all nodes see, or a Hub id; every rank decodes the experts of its own shard, so that
there is no BF16 copy anywhere. OUTPUT gets `first`, an export of all, and every `--patch-every` steps a patch of what changed,
which `kconvert apply OUTPUT/first OUTPUT/patch-N` merges. Without GPUs the ranks are processes of the CPU (gloo).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kconvert_qat import QATConfig, at_step, export, load, prepare


def main() -> None:
    options = parsed()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = sharded(options.model, device, world)
    covered = prepare(model, QATConfig(grid=options.grid))
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    batches = blocks(options, rank, world)
    if rank == 0:
        print(covered, flush=True)
    export(model, options.output / "first", source=options.model, overwrite=True)
    for step in range(options.steps):
        at_step(model, step)
        for micro in range(options.micro_batches):
            model.set_requires_gradient_sync(micro == options.micro_batches - 1)
            ids = next(batches).to(device)
            loss = model(ids, labels=ids).loss / options.micro_batches
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item() * options.micro_batches:.4f}", flush=True)
        if (step + 1) % options.patch_every == 0:
            patch = options.output / f"patch-{step + 1}"
            export(model, patch, source=options.model, only_changed=True, overwrite=True)
    torch.distributed.destroy_process_group()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--grid", default="int4")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--patch-every", type=int, default=10)
    return parser.parse_args()


def sharded(source: str, device: torch.device, world: int) -> Any:
    """The model on all ranks together, F32 masters filled from the codes of `source`."""
    config = AutoConfig.from_pretrained(source)
    del config.quantization_config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load(model, source, device=device)
    return model


def blocks(options: argparse.Namespace, rank: int, world: int) -> Iterator[torch.Tensor]:
    """Token ids [batch, block], for every rank others, over and over."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = torch.tensor(tokenizer(options.text.read_text("utf-8"), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // options.block * options.block].view(-1, options.block)[rank::world]
    if not len(rows):
        raise SystemExit(f"{options.text} has {len(ids)} tokens, too few for a block of {options.block} on every rank")
    number = 0
    while True:
        yield rows[torch.arange(number, number + options.batch_size) % len(rows)]
        number += options.batch_size


if __name__ == "__main__":
    main()
