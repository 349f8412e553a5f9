"""Training on several gloo ranks, with micro-batches: the same weights as on one, and patches and exports written by all, or
by none.

FSDP2 on 2 and 4 ranks, and transformers' expert parallelism on 2, in the same processes, which take long to start.
"""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from kconvert.errors import KconvertError

MICRO = 2  # batches before a step, on each rank
STEPS = 2


def make():
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch(step, rank, number):
    """What a rank sees; every one sees something else."""
    return (torch.arange(16).view(1, 16) * (3 + 2 * rank) + 7 * number + step) % 64


def loss_of(model, ids):
    return model(ids, labels=ids).loss / MICRO


def optimiser(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def alone(folder, ranks):
    """What one process makes of the batches of all ranks; gradients are added up in f64, as the ranks do."""
    from kconvert_qat import export, prepare

    model = make()
    prepare(model)
    step = optimiser(model)
    for number in range(STEPS):
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
        for rank in range(ranks):
            for micro in range(MICRO):
                loss_of(model, batch(number, rank, micro)).backward()
                for name, parameter in model.named_parameters():
                    sums[name] += parameter.grad
                model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.grad = (sums[name] / ranks).float()
        step.step()
        model.zero_grad()
    export(model, folder)
    return model.state_dict()


def sharded(ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make()
    # Sums of f32 in f64 have no order, whatever the way of the gradients from rank to rank.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def begin(rank, ranks, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)


def work(rank, ranks, port, folder):
    begin(rank, ranks, port)
    train_fsdp(rank, ranks, folder)
    if ranks == 2:
        train_expert_parallel(rank, ranks, folder)
    torch.distributed.destroy_process_group()


def train_fsdp(rank, ranks, folder):
    from kconvert_qat import at_step, export, prepare
    from kconvert_qat.attach import attached_to

    model = sharded(ranks)
    prepare(model)
    experts, alone = model.model.layers[0].mlp.experts, make()
    prepare(alone)
    ours, theirs = (attached_to(it).serve(it, "down_proj") for it in (experts, alone.model.layers[0].mlp.experts))
    assert len(ours.to_local()) * ranks == len(theirs)  # each its own matrices
    assert torch.equal(ours.full_tensor(), theirs)
    step = optimiser(model)
    for number in range(STEPS):
        at_step(model, number)
        for micro in range(MICRO):
            model.set_requires_gradient_sync(micro == MICRO - 1)
            loss_of(model, batch(number, rank, micro)).backward()
        step.step()
        step.zero_grad()
        if number == 0:
            export(model, f"{folder}/first")
    export(model, f"{folder}/patch", only_changed=True)
    wanted = torch.load(f"{folder}/wanted.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), wanted[name]), name
    if ranks == 2:
        refuse(model, rank, Path(folder))


def gives_out(real):
    """After some weights."""
    calls = iter(range(3))

    def of(*arguments):
        if next(calls, None) is None:
            raise MemoryError("there is no memory left")
        return real(*arguments)

    return of


def refused_load(model, source):
    from kconvert_qat import load

    with pytest.raises(KconvertError) as raised:
        load(model, source)
    said = [None] * 2
    torch.distributed.all_gather_object(said, str(raised.value))
    return said


def refuse(model, rank, folder):
    """What one rank refuses, all do, by one sentence, and none waits for another; after it an export is as before."""
    from kconvert_qat import export
    from kconvert_qat.export import encode

    def refused(*arguments, error=KconvertError, **options):
        with pytest.raises(error) as raised:
            export(model, *arguments, **options)
        said = [None] * 2
        torch.distributed.all_gather_object(said, str(raised.value))
        return said

    def fails(nbytes):
        raise RuntimeError("the progress bar broke")

    full, other = folder / "plain", folder / "refused"
    for options in ({}, {"only_changed": True}):  # what the first rank alone looks at
        one, two = refused(full, **options)
        assert one == two
        assert one.startswith(f"{full} ")
    source = full if rank == 0 else folder / "nowhere"
    one, two = refused(other, source=source, for_transformers=False)  # what the first rank has
    assert one == two
    assert one.startswith(f"{folder / 'nowhere'} ")
    local = model.model.layers[1].mlp.experts.down_proj.to_local()
    with torch.no_grad():
        before = local[0, 0, 0].clone()
        local[0, 0, 0] = float("nan")
        for options in ({}, {"only_changed": True}):  # what is found when others wait with the next weight
            one, two = refused(folder / f"refused-{len(options)}", **options)
            assert one == two
            assert "not finite" in one
        local[0, 0, 0] = before
    one, two = refused(other, error=RuntimeError if rank == 0 else KconvertError, advance=fails, overwrite=True)
    assert (one, two) == ("the progress bar broke", "rank 0 could not go on; its own output says why")
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:  # another than the one that writes, while weights are gathered
            patched.setattr(encode.Whole, "of", gives_out(encode.Whole.of))
        for options in ({}, {"only_changed": True}):
            one, two = refused(
                folder / f"gives-out-{len(options)}", error=(MemoryError, KconvertError)[rank == 0], **options
            )
            assert (one, two) == ("rank 1 could not go on; its own output says why", "there is no memory left")
    one, two = refused(folder / "differs", only_changed=rank == 1)
    assert one == two
    assert "different exports" in one
    plan = export(model, folder / "unchanged", only_changed=True)
    assert rank > 0 or not plan.shards
    one, two = refused_load(model, full if rank == 0 else folder / "nowhere")
    assert one == two
    assert one.startswith(f"{folder / 'nowhere'} ")


def train_expert_parallel(rank, ranks, folder):
    """transformers' own: a rank holds half of the experts, tokens go to them."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from kconvert_qat import export, load, prepare

    single = make()
    plan = DistributedConfig(fsdp_size=ranks, ep_size=ranks)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/plain", dtype=torch.float32, distributed_config=plan)
    experts = model.model.layers[0].mlp.experts
    assert len(experts.down_proj.to_local()) == len(single.model.layers[0].mlp.experts.down_proj) // ranks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load(model, f"{folder}/plain")
    ids = batch(0, rank, 0)
    untrained = single(ids).logits
    for each in (single, model):
        prepare(each)
    logits = model(ids).logits
    torch.testing.assert_close(logits, single(ids).logits, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits, untrained, rtol=1e-3, atol=1e-4)
    loss_of(model, ids).backward()
    for number in range(ranks):
        loss_of(single, batch(0, number, 0)).backward()
    for one, other in zip(single.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), one.grad / ranks, rtol=1e-4, atol=1e-7)
    export(model, f"{folder}/expert-parallel")


def spawn(work, ranks, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (ranks, port, *map(str, arguments)), nprocs=ranks)


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fsdp2_makes_the_weights_of_one_rank_bit_for_bit_and_expert_parallel_ranks_export_as_one_does(
    tmp_path, monkeypatch, ranks
):
    import kconvert
    from kconvert_qat import export, prepare

    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.save(alone(tmp_path / "alone", ranks), tmp_path / "wanted.pt")
    finally:
        torch.set_num_threads(threads)
    make().save_pretrained(tmp_path / "plain")
    spawn(work, ranks, tmp_path)
    kconvert.apply(tmp_path / "first", tmp_path / "patch")
    ours, theirs = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if ranks == 2:
        single = make()
        prepare(single)
        export(single, tmp_path / "single")
        ours, theirs = tensors_of(tmp_path / "expert-parallel"), tensors_of(tmp_path / "single")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
