"""FSDP2 on two gloo ranks: the same logits and gradients as on one, and an export written by both."""

import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

ORDERS = ("prepare first", "shard first")
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def make():
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(**CONFIG, intermediate_size=32, num_local_experts=4)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for order in ORDERS:
        compare(order, folder)
    torch.distributed.destroy_process_group()


def compare(order, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from kconvert_qat import export, prepare

    ids = torch.arange(32).view(2, 16)
    single, model = make(), make()
    prepare(single)
    mesh = init_device_mesh("cpu", (2,))
    if order == "prepare first":
        prepare(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if order == "shard first":
        prepare(model)
    logits = {name: each(ids).logits for name, each in (("single", single), ("sharded", model))}
    for value in logits.values():
        value.square().mean().backward()
    torch.testing.assert_close(logits["sharded"], logits["single"], rtol=1e-6, atol=1e-6)
    wanted = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name].grad, rtol=1e-4, atol=1e-6)
    export(model, f"{folder}/{order}")
    for each in (single, model):  # the next step sees what the optimiser made, which FSDP2 gathers without counting
        torch.optim.SGD(each.parameters(), lr=1e-1).step()
    stepped = single(ids).logits
    torch.testing.assert_close(model(ids).logits, stepped, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stepped, logits["single"], rtol=1e-2, atol=1e-3)


def test_two_ranks_train_and_export_as_one_does_in_either_order_of_sharding_and_preparing(tmp_path, monkeypatch):
    from kconvert_qat import export, prepare

    # The ranks import this module by its name, from wherever pytest was started.
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    model = make()
    prepare(model)
    export(model, tmp_path / "single")
    ours, *others = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("single", *ORDERS))
    for theirs in others:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
