"""A model of transformers filled from a checkpoint in any encoding is what from_pretrained makes of its BF16 conversion."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import kconvert
from kconvert.errors import KconvertError
from kconvert.models.catalogue import load_manifest
from kconvert.targets.sample import SampleRecipe, plan_synthetic
from kconvert_qat import QATConfig, export, load, prepare
from kconvert_qat.trainer import load_model

SIZES = {
    **{"layers": 3, "dense_layers": 1, "experts": 4, "hidden": 128, "intermediate": 128, "moe_intermediate": 64},
    **{"vocab": 128, "heads": 4, "q_rank": 32, "kv_rank": 32},
}
# What is read, from which sample; None: the sample itself.
SOURCES = {
    "int4": ("kimi-k2-thinking", None),
    "fp8": ("deepseek-v3", None),
    "mxfp4-stacks": ("gpt-oss", None),
    "nvfp4": ("kimi-k2-thinking", "nvfp4"),
    "qwen-int4": ("qwen3-moe", "int4"),
    "qwen-fp8": ("qwen3-moe", "fp8"),
    "qwen-bf16": ("qwen3-moe", None),
    "mixtral-mxfp4": ("mixtral", "mxfp4"),
    "minimax-fp8": ("minimax-m2", None),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def made(shelf):
    """`made(name)`: one of SOURCES, and its BF16 conversion with a config.json that transformers has a class for."""

    def make(name):
        like, to = SOURCES[name]
        sample, source, plain = (shelf / f"{name}-{kind}" for kind in ("sample", "source", "bf16"))
        if not plain.exists():
            dims = load_manifest(like).dims
            sizes = {symbol: size for symbol, size in SIZES.items() if symbol in dims}
            kconvert.convert(plan_synthetic(SampleRecipe(like, sizes)), sample)
            if to:
                kconvert.convert(kconvert.plan(sample, kconvert.Recipe(to)), source)
            else:
                sample.rename(source)
            if any(weight.format.quantised for weight in kconvert.inspect(source).weights):
                kconvert.convert(kconvert.plan(source, kconvert.Recipe("bf16")), plain)
            else:
                plain.symlink_to(source)
            config = json.loads((plain / "config.json").read_text())
            if config["model_type"] == "kimi_k2":  # transformers 5.23 would give it random experts, with a report
                del config["auto_map"]
                (plain / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
        return source, plain

    return make


def blank(model, dtype=torch.bfloat16):
    with torch.device("meta"):
        return type(model)._from_config(model.config, dtype=dtype)


def check_same(mine, wanted):
    ours, theirs = mine.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].device) == (value.dtype, value.device), name
        assert torch.equal(ours[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), wanted.buffers(), strict=True))
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(mine.eval()(ids).logits, wanted.eval()(ids).logits)


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_on_the_meta_device_becomes_that_of_the_bf16_conversion(made, name):
    source, plain = made(name)
    wanted = load_model(plain, torch.bfloat16)
    model = blank(wanted)
    load(model, source)
    check_same(model, wanted)


@pytest.mark.parametrize("name", ["int4", "mxfp4-stacks", "qwen-fp8"])
def test_a_model_that_is_there_keeps_its_parameters_and_what_is_frozen(made, name):
    source, plain = made(name)
    wanted = load_model(plain, torch.float32)
    model = type(wanted)._from_config(wanted.config, dtype=torch.float32)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    load(model, source)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert [name for name, parameter in after.items() if not parameter.requires_grad] == ["model.embed_tokens.weight"]
    check_same(model, wanted)


def test_what_was_loaded_trains_and_comes_back_as_the_codes_that_it_had(made, tmp_path):
    source, _ = made("int4")
    model = load_model(source, torch.bfloat16)
    prepare(model, QATConfig())
    export(model, tmp_path / "int4", source=source)
    with kconvert.open(source) as before, kconvert.open(tmp_path / "int4") as after:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_loaded_is_saved_by_the_names_of_a_checkpoint(made, tmp_path):
    source, plain = made("qwen-int4")
    model = load_model(source, torch.bfloat16)
    model.save_pretrained(tmp_path)
    with kconvert.open(tmp_path) as mine, kconvert.open(plain) as theirs:
        assert mine.keys() == theirs.keys()


def damaged(raw, source, folder, change):
    checkpoint = raw.load(source)
    change(checkpoint)
    return checkpoint.save(folder)


NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.pop(NORM), f"'{NORM}'"),
        (lambda it: it.put("model.layers.1.self_attn.sinks", it[NORM]), r"sinks', for which the .* has no place"),
        (
            lambda it: setattr(it["model.layers.1.mlp.experts.1.up_proj.weight_scale"], "data", b"\xff" * 512),
            r"model\.layers\.1\.mlp\.experts\.1\.up_proj\.weight_scale' is not finite",
        ),
        (
            lambda it: setattr(it[NORM], "shape", [64, 2]),
            rf"{NORM}",
        ),
    ],
    ids=["missing", "unexpected", "bad scale", "bad shape"],
)
def test_what_does_not_fit_is_one_sentence(made, raw, tmp_path, change, message):
    source, plain = made("qwen-int4")
    bad = damaged(raw, source, tmp_path / "bad", change)
    with pytest.raises(KconvertError, match=message) as said:
        load(blank(load_model(plain, torch.bfloat16)), bad)
    assert "\n" not in str(said.value)


def test_another_models_checkpoint_is_one_sentence(made):
    _, plain = made("qwen-int4")
    other, _ = made("mixtral-mxfp4")
    with pytest.raises(KconvertError, match=r"but the Qwen3MoeForCausalLM as|of another model"):
        load(blank(load_model(plain, torch.bfloat16)), other)


def test_a_model_with_fewer_layers_is_another_one_but_layers_behind_the_checkpoints_last_are_of_mtp(made, tmp_path):
    source, plain = made("qwen-int4")
    model = load_model(plain, torch.bfloat16)
    model.config.num_hidden_layers -= 1
    with pytest.raises(KconvertError, match=r"has 'model\.layers\.2\.\S*' and .* has no place"):
        load(blank(model), source)
    shutil.copytree(source, tmp_path / "mtp")
    config = json.loads((tmp_path / "mtp" / "config.json").read_bytes())
    config["num_hidden_layers"] -= 1
    (tmp_path / "mtp" / "config.json").write_text(json.dumps(config))
    shorter = blank(model)
    load(shorter, tmp_path / "mtp")
    assert torch.equal(shorter.model.layers[1].mlp.gate.weight, model.model.layers[1].mlp.gate.weight)


def test_a_device_map_is_followed_and_one_that_names_the_disk_refused(made):
    source, plain = made("qwen-int4")
    wanted = load_model(plain, torch.bfloat16)
    model = blank(wanted)
    model.hf_device_map = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    load(model, source)
    check_same(model, wanted)
    model.hf_device_map["lm_head"] = "disk"
    with pytest.raises(KconvertError, match="has weights on the disk, where load puts none"):
        load(model, source)


def test_a_module_of_no_transformers_is_refused(module_list, made):
    with pytest.raises(KconvertError, match="and Block is none"):
        load(module_list, made("qwen-int4")[0])


def work(rank, port, pairs):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    touched = []
    reading = kconvert.Weights.__getitem__
    kconvert.Weights.__getitem__ = lambda self, name: touched.append(name) or reading(self, name)
    for source, plain in pairs:
        touched.clear()
        check_shards(source, plain)
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in touched if ".experts." in name}
        assert experts == {2 * rank, 2 * rank + 1}
    torch.distributed.destroy_process_group()


def check_shards(source, plain):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wanted = load_model(plain, torch.float32).eval()
    mesh = init_device_mesh("cpu", (2,))
    for there in (False, True):
        model = type(wanted)._from_config(wanted.config, dtype=torch.float32) if there else blank(wanted, torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        load(model, source)
        theirs = wanted.state_dict()
        for name, value in model.state_dict().items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(whole, theirs[name]), name
        ids = torch.arange(24).view(2, 12)
        torch.testing.assert_close(model.eval()(ids).logits, wanted(ids).logits, rtol=1e-5, atol=1e-5)


def test_each_of_two_ranks_decodes_its_own_experts(made, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, [made(name) for name in ("int4", "qwen-fp8")]), nprocs=2)


def test_beside_the_model_little_memory_is_needed(shelf):
    sizes = {"layers": 3, "experts": 16, "hidden": 1024, "moe_intermediate": 768, "vocab": 512, "heads": 4}
    kconvert.convert(plan_synthetic(SampleRecipe("qwen3-moe", sizes)), shelf / "wide")
    kconvert.convert(kconvert.plan(shelf / "wide", kconvert.Recipe("int4")), shelf / "wide-int4")
    code = (
        "import resource, sys, torch, transformers; from kconvert_qat import load\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1]); del config.quantization_config\n"
        "with torch.device('meta'): model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak(); load(model, sys.argv[1])\n"
        "print(peak() - before, sum(p.numel() * 4 for p in model.parameters()))"
    )
    command = [sys.executable, "-c", code, shelf / "wide-int4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 400 << 20
    assert grown < size + (150 << 20)
